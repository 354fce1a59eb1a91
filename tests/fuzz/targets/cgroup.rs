//! Fuzzes the parser of cgroup paths.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::cgroup(bytes);
});
