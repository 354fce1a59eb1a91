//! Patterns of SPIFFE IDs, compared with models that work on texts.

use super::*;
use crate::random_cases::for_random_cases;

const SEGMENTS: [&str; 9] = ["a", "b", "*", "**", "A.b_c-1", "", ".", "..", "a*"];

fn choose(random: &mut fastrand::Rng, list: &[&'static str]) -> &'static str {
    list[random.usize(..list.len())]
}

/// Returns a path of one to `longest` of these segments.
fn path(random: &mut fastrand::Rng, segments: &[&'static str], longest: usize) -> String {
    let path: Vec<_> = (0..random.usize(1..=longest))
        .map(|_| choose(random, segments))
        .collect();
    path.join("/")
}

fn model_matches(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        (["**"], [_, ..]) => true,
        ([first, pattern @ ..], [segment, path @ ..]) => {
            (*first == "*" || first == segment) && model_matches(pattern, path)
        }
        ([], []) => true,
        _ => false,
    }
}

fn segments(path: &str) -> Vec<&str> {
    path.split('/').collect()
}

#[test]
fn pattern_agrees_with_a_model() {
    for_random_cases(5000, |random| {
        let pattern_path = path(random, &SEGMENTS, 4);
        let text = format!("spiffe://{}/{pattern_path}", choose(random, &["t", "u"]));
        let is_name = |segment: &&str| matches!(*segment, "a" | "b" | "A.b_c-1");
        let parts = segments(&pattern_path);
        let (last, others) = parts.split_last().unwrap();
        let is_valid = others.iter().all(|part| is_name(part) || *part == "*")
            && (is_name(last) || matches!(*last, "*" | "**"));
        let parsed = SpiffeIdPattern::parse(&text);
        assert_eq!(parsed.is_ok(), is_valid, "{text}");
        assert_eq!(
            SpiffeId::parse(&text).is_ok(),
            parts.iter().all(is_name),
            "{text}"
        );
        let Ok(pattern) = parsed else { return };
        assert_eq!(
            pattern.exact().is_some(),
            parts.iter().all(is_name),
            "{text}"
        );
        for _ in 0..20 {
            let id_path = path(random, &["a", "b", "A.b_c-1"], 5);
            for domain in ["t", "u"] {
                let id = id(&format!("spiffe://{domain}/{id_path}"));
                let expected =
                    pattern.trust_domain() == domain && model_matches(&parts, &segments(&id_path));
                assert_eq!(pattern.matches(&id), expected, "{text} and {id}");
                assert!(!expected || segments(&id_path).len() >= pattern.least_segments());
            }
        }
    });
}

/// Compares with IDs of up to five segments. `z` is in no pattern, so only a wildcard matches it.
#[test]
fn cover_of_random_patterns_is_that_of_their_ids() {
    let mut paths = vec![Vec::new()];
    let mut all = Vec::new();
    for _ in 0..5 {
        paths = paths
            .iter()
            .flat_map(|path: &Vec<&str>| ["a", "b", "z"].map(|part| [&path[..], &[part]].concat()))
            .collect();
        all.extend(
            paths
                .iter()
                .map(|path| id(&format!("spiffe://t/{}", path.join("/")))),
        );
    }
    for_random_cases(300, |random| {
        let [one, other] = [(); 2].map(|()| {
            loop {
                let path = path(random, &["a", "b", "*", "**"], 4);
                if let Ok(pattern) = SpiffeIdPattern::parse(&format!("spiffe://t/{path}")) {
                    break pattern;
                }
            }
        });
        let covers = all
            .iter()
            .filter(|id| other.matches(id))
            .all(|id| one.matches(id));
        assert_eq!(
            one.covers(&other),
            covers,
            "{} and {}",
            one.as_str(),
            other.as_str()
        );
    });
}
