//! Fuzzes the parser of addresses of agents.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::endpoint(bytes);
});
