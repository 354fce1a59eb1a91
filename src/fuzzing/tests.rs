use std::collections::BTreeSet;
use std::path::Path;

use super::*;

mod sources;

/// A parser with the name of its target and of the folder of its seeds.
type Parser = (&'static str, fn(&[u8]) -> bool);

const PARSERS: [Parser; 24] = [
    ("sock_diag", sock_diag),
    ("proc", proc),
    ("mountinfo", mountinfo),
    ("cgroup", cgroup),
    ("accounts", accounts),
    ("request", request),
    ("token", token),
    ("certificates", certificates),
    ("certificate_facts", certificate_facts),
    ("configuration", configuration),
    ("spiffe_id", spiffe_id),
    ("arn", arn),
    ("endpoint", endpoint),
    ("handover", handover),
    ("client", client),
    ("profiles", profiles),
    ("sts_error", sts_error),
    ("proxy", proxy),
    ("accept", accept),
    ("url", url),
    ("documents", documents),
    ("socket_unit", socket_unit),
    ("metadata_path", metadata_path),
    ("metadata_token", metadata_token),
];
/// Number of damaged seeds per parser.
const ROUNDS: usize = 2_000;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz"))
}

/// Returns the seeds of a parser, in the order of their names.
fn seeds(parser: &str) -> Vec<(String, Vec<u8>)> {
    let files = std::fs::read_dir(folder().join("seeds").join(parser))
        .unwrap_or_else(|error| panic!("seeds of {parser}: {error}"))
        .map(|entry| entry.unwrap().path());
    let mut seeds: Vec<_> = files
        .map(|path| (path.display().to_string(), std::fs::read(&path).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

fn damage(bytes: &mut Vec<u8>, other: &[u8], random: &mut fastrand::Rng) {
    let at = random.usize(..=bytes.len());
    let end = at + random.usize(..=(bytes.len() - at).min(16));
    match random.u8(..5) {
        0 => drop(bytes.drain(at..end)),
        1 => {
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        2 if at < bytes.len() => bytes[at] = random.u8(..),
        3 => {
            let from = random.usize(..=other.len());
            let piece = other[from..].iter().take(random.usize(..32)).copied();
            bytes.splice(at..end, piece);
        }
        _ => drop(
            bytes.splice(
                at..at,
                *random
                    .choice(&[*b"\0\0", *b"..", *b"//", *b"{}", *b"\xff:"])
                    .unwrap(),
            ),
        ),
    }
}

#[test]
fn each_parser_has_a_target_and_seeds() {
    let names = |names: &mut dyn Iterator<Item = String>| names.collect::<BTreeSet<_>>();
    let entries = |path: &str| {
        names(
            &mut std::fs::read_dir(folder().join(path))
                .unwrap()
                .map(|entry| {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    name.trim_end_matches(".rs").to_owned()
                }),
        )
    };
    let parsers = names(&mut PARSERS.iter().map(|(name, _)| (*name).to_owned()));
    assert_eq!(entries("targets"), parsers);
    assert_eq!(entries("seeds"), parsers);
    let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    for parser in parsers {
        let target =
            std::fs::read_to_string(folder().join(format!("targets/{parser}.rs"))).unwrap();
        assert!(
            target.contains(&format!("awsvid::fuzzing::{parser}(bytes)")),
            "{target}"
        );
        assert!(
            manifest.contains(&format!("path = \"targets/{parser}.rs\"")),
            "{parser}"
        );
    }
}

#[test]
fn properties_hold_for_the_seeds_and_for_damage_to_them() {
    let seed: u64 = std::env::var("AWSVID_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(0x_a115_71d0);
    for (parser, accepts) in PARSERS {
        let mut random = fastrand::Rng::with_seed(seed);
        let seeds = seeds(parser);
        // Without this a property could hold because no input reaches it.
        let accepted = seeds.iter().filter(|(_, bytes)| accepts(bytes)).count();
        assert!(accepted > 0, "{parser} accepts none of its seeds");
        let check = |what: &str, bytes: &[u8]| {
            let holds = std::panic::catch_unwind(|| accepts(bytes)).is_ok();
            assert!(
                holds,
                "AWSVID_SEED={seed}, {parser}, {what}: {:?}",
                String::from_utf8_lossy(bytes)
            );
        };
        for (name, bytes) in &seeds {
            check(name, bytes);
        }
        for round in 0..ROUNDS {
            let (name, bytes) = random.choice(&seeds).unwrap();
            let mut bytes = bytes.clone();
            for _ in 0..random.u8(1..5) {
                let (_, other) = random.choice(&seeds).unwrap();
                damage(&mut bytes, other, &mut random);
            }
            check(&format!("round {round}, from {name}"), &bytes);
        }
    }
}
