//! Fuzzes all that awsvid parses with code of its own. The first byte chooses a parser. See
//! `src/fuzzing.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::any(bytes);
});
