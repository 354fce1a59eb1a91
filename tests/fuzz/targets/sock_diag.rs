//! Fuzzes the parser of replies of `sock_diag`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::sock_diag(bytes);
});
