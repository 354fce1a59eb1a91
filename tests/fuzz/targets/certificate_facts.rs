//! Fuzzes the facts of certificates.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::certificate_facts(bytes);
});
