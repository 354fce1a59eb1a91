//! Fuzzes the parser of SPIFFE IDs, their patterns, and session names.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::spiffe_id(bytes);
});
