//! Fuzzes the parser of headers `Accept`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::accept(bytes);
});
