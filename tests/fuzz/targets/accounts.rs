//! Fuzzes the parser of `/etc/passwd` and `/etc/group`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::accounts(bytes);
});
