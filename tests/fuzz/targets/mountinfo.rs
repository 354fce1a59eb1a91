//! Fuzzes the parser of `/proc/self/mountinfo`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::mountinfo(bytes);
});
