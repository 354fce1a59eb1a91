//! Fuzzes the parser of role ARNs and their templates.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::arn(bytes);
});
