//! Property tests: one check for many random cases.

use std::panic::{RefUnwindSafe, catch_unwind, resume_unwind};

/// Returns the seed of `AWSVID_SEED`, if it is set.
pub(crate) fn fixed_seed() -> Option<u64> {
    std::env::var("AWSVID_SEED")
        .ok()
        .map(|seed| seed.parse().expect("AWSVID_SEED is a number"))
}

/// Runs `check` with the random numbers of `cases` seeds. A failure prints the seed of its case.
/// With `AWSVID_SEED` set to that, the case runs alone.
pub(crate) fn for_random_cases(cases: u64, check: impl Fn(&mut fastrand::Rng) + RefUnwindSafe) {
    let fixed = fixed_seed();
    let first = fixed.unwrap_or_else(|| fastrand::u64(..));
    let cases = if fixed.is_some() { 1 } else { cases };
    for seed in (0..cases).map(|case| first.wrapping_add(case)) {
        if let Err(panic) = catch_unwind(|| check(&mut fastrand::Rng::with_seed(seed))) {
            eprintln!("AWSVID_SEED={seed} runs this case alone");
            resume_unwind(panic);
        }
    }
}
