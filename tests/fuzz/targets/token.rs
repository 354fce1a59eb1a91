//! Fuzzes the parser of JWT-SVIDs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::token(bytes);
});
