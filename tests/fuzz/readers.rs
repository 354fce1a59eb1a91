//! Everything that awsvid reads with code of its own; the first byte chooses which. See `src/fuzzing.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    awsvid::fuzzing::any(bytes);
});
