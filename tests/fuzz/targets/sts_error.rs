//! Fuzzes the parser of responses of an STS without credentials.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::sts_error(bytes);
});
