//! Fuzzes the parser of messages of a handover.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::handover(bytes);
});
