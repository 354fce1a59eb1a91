//! Fuzzes the parser of settings of proxies.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::proxy(bytes);
});
