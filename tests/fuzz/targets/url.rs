//! Fuzzes the parser of URLs of issuers and values of `--resolve`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::url(bytes);
});
