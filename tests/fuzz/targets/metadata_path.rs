//! Fuzzes the paths of the instance metadata service.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::metadata_path(bytes);
});
