//! Fuzzes the parser of config and credentials files of SDKs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::profiles(bytes);
});
