//! Fuzzes the parser of socket units of systemd.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::socket_unit(bytes);
});
