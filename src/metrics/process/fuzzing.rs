//! The fuzz target for `/proc/self/stat`, with arbitrary text.

use super::ProcessStat;

/// Checks that the program's name does not matter.
pub(crate) fn stat(text: &str) -> bool {
    let Some(stat) = ProcessStat::parse(text) else {
        return false;
    };
    let again = ProcessStat::parse(&format!("7 (a) R 1 (b) {text}"));
    let numbers = |stat: &ProcessStat| {
        let ticks = [stat.cpu_ticks, stat.start_ticks].map(f64::to_bits);
        (ticks, stat.threads, stat.virtual_bytes, stat.resident_pages)
    };
    assert_eq!(again.as_ref().map(numbers), Some(numbers(&stat)));
    true
}
