//! Fuzzes the parser of HTTP responses of the daemon.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::client(bytes);
});
