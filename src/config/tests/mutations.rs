//! Random damage to the example: the reader accepts or reports it, and never panics.

use super::*;
use crate::workload_rule::WorkloadRule;

/// Pieces of text that have a meaning in some position.
const PIECES: [&str; 24] = [
    "[[workload]]\n",
    "[[role]]\n",
    "[listen]\n",
    "[sts]",
    "=",
    "\"",
    "'''",
    "{path[99999999999999999999]}",
    "{",
    "**",
    "*",
    "..",
    "spiffe://",
    "arn:aws:iam::",
    "[",
    "]",
    "{}",
    "-1",
    "99999999999999999999999",
    "1e999",
    "nan",
    "true",
    "\u{0}",
    "é",
];
const ROUNDS: u32 = 4000;

fn mutate(text: &mut Vec<u8>, random: &mut fastrand::Rng) {
    let at = random.usize(..=text.len());
    let end = at + random.usize(..=(text.len() - at).min(40));
    match random.u8(..6) {
        0 => drop(text.drain(at..end)),
        1 => {
            let copy = text[at..end].to_vec();
            let to = random.usize(..=text.len());
            text.splice(to..to, copy);
        }
        2 => drop(text.splice(at..at, random.choice(PIECES).unwrap_or_default().bytes())),
        3 => drop(text.splice(at..end, random.choice(PIECES).unwrap_or_default().bytes())),
        4 if at < text.len() => text[at] = random.u8(..),
        _ => {
            let mut lines: Vec<_> = text
                .split(|byte| *byte == b'\n')
                .map(<[u8]>::to_vec)
                .collect();
            random.shuffle(&mut lines[..]);
            *text = lines.join(&b'\n');
        }
    }
}

/// Returns all keys of the example, so that damage hits values and not only comments.
fn uncommented() -> String {
    let key = |line: &str| line.starts_with(|c: char| c.is_ascii_lowercase() || c == '[');
    EXAMPLE
        .lines()
        .map(|line| line.trim_start_matches(['#', ' ']))
        .filter(|line| key(line))
        .fold(String::new(), |all, line| all + line + "\n")
}

#[test]
fn reader_survives_damage() {
    let seed = 0x_a115_71d0;
    let mut random = fastrand::Rng::with_seed(seed);
    let sources = [EXAMPLE.to_owned(), uncommented(), LEAST.to_owned()];
    let (mut taken, mut rejected, mut beyond_syntax) = (0, 0, 0);
    for round in 0..ROUNDS {
        let mut bytes = random.choice(&sources).unwrap().clone().into_bytes();
        for _ in 0..random.u8(1..6) {
            mutate(&mut bytes, &mut random);
        }
        let text = String::from_utf8_lossy(&bytes);
        let outcome = std::panic::catch_unwind(|| parse(&text));
        let Ok(outcome) = outcome else {
            panic!("round {round} of seed {seed:#x} panicked at:\n{text}")
        };
        let problems = match outcome {
            Ok(loaded) => {
                taken += 1;
                assert_properties(&loaded.config, &text);
                loaded.warnings
            }
            Err(problems) => {
                rejected += 1;
                beyond_syntax += u32::from(problems.iter().any(|problem| !problem.key.is_empty()));
                assert!(!problems.is_empty(), "{text}");
                problems
            }
        };
        let lines = text.matches('\n').count() + 1;
        assert!(
            problems.is_sorted_by(|a, b| Problem::by_line(a, b).is_le()),
            "{problems:?}"
        );
        assert!(
            problems
                .iter()
                .all(|p| line_of(p).is_none_or(|line| (1..=lines).contains(&line))),
            "{problems:?}\n{text}"
        );
        assert!(
            !ConfigErrors {
                path: "x".into(),
                problems
            }
            .to_string()
            .contains("\n\n"),
            "{text}"
        );
    }
    // Too little or too much damage would show nothing.
    assert!(
        taken > 100 && rejected > 100 && beyond_syntax > 100,
        "{taken} taken, {rejected} rejected, {beyond_syntax}"
    );
}

/// Checks the properties of an accepted configuration on which the rest of the program relies.
fn assert_properties(config: &Config, text: &str) {
    assert!(
        config
            .listen
            .tcp
            .iter()
            .all(|address| address.ip().is_loopback()),
        "{text}"
    );
    assert!(
        config.listen.unix.is_some() || !config.listen.tcp.is_empty() || config.pods.enabled,
        "{text}"
    );
    assert!(!config.workloads.is_empty(), "{text}");
    for workload in &config.workloads {
        let (named, rule) = (&workload.rule, &workload.rule.rule);
        assert!(
            [rule.uid, rule.gid, rule.supplementary_group]
                .iter()
                .all(|id| *id != Some(65534)),
            "{text}"
        );
        let WorkloadRule {
            uid,
            gid,
            supplementary_group,
            systemd_unit,
            cgroup,
            ..
        } = rule;
        let by_number = [uid, gid, supplementary_group]
            .iter()
            .any(|id| id.is_some());
        let ids = by_number || named.names().next().is_some();
        assert!(
            ids || systemd_unit.is_some() || cgroup.is_some() || text.contains("allow_exe_only"),
            "{text}"
        );
    }
    for role in &config.roles.defined {
        assert!(
            (900..=43_200).contains(&role.duration.as_secs()) && role.duration.subsec_nanos() == 0,
            "{text}"
        );
        let endpoint = role.sts.endpoint.as_deref().unwrap_or("https://");
        assert!(
            endpoint.starts_with("https://") || endpoint.starts_with("http://"),
            "{text}"
        );
        assert!(
            role.role_arn
                .highest_segment()
                .is_none_or(|n| n < role.spiffe_id.least_segments()),
            "{text}"
        );
    }
}
