//! Fuzzes the verification of metadata tokens.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::metadata_token(bytes);
});
