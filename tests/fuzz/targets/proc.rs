//! Fuzzes the parser of files of `/proc/<pid>`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::proc(bytes);
});
