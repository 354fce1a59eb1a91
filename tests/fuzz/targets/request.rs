//! Fuzzes the parser of HTTP requests of callers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::request(bytes);
});
