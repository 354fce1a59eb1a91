//! Fuzzes the parser of documents of an issuer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::documents(bytes);
});
