//! Fuzzes the parser of X.509-SVIDs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::certificates(bytes);
});
