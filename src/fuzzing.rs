//! All parsers of awsvid's own, as functions of bytes that panic where a property does not hold.
//!
//! `tests/fuzz` runs them in a fuzzer. A unit test runs them over the seeds in `tests/fuzz/seeds`
//! and over randomly damaged seeds.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::config::{Config, ConfigLine};
use crate::identity::{ArnTemplate, RoleArn, SessionName, SpiffeId, SpiffeIdPattern};
use crate::socket_endpoint::Endpoint;
use crate::svid::JwtSvid;
use crate::{attest, http};

/// Selects a parser by the first byte and runs it on the rest. Returns whether the parser accepts
/// that.
pub fn any(bytes: &[u8]) -> bool {
    let Some((choice, rest)) = bytes.split_first() else {
        return false;
    };
    let text = String::from_utf8_lossy(rest);
    match choice {
        b'd' => attest::fuzzing::sock_diag(rest),
        b'p' => attest::fuzzing::proc(&text),
        b'm' => attest::fuzzing::mountinfo(&text),
        b'g' => attest::fuzzing::cgroup(&text),
        b'r' => http::fuzzing::request(rest),
        b't' => token(rest),
        b'c' => configuration(&text),
        b's' => spiffe_id(&text),
        b'a' => arn(&text),
        b'e' => endpoint(&text),
        _ => false,
    }
}

/// Returns 2026-01-01, the time at which the seeds are valid.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

/// Checks a JWT-SVID: header, claims and signature on a line each, or the encoded token on one
/// line.
fn token(bytes: &[u8]) -> bool {
    let Ok(id) = SpiffeId::parse("spiffe://example.org/billing") else {
        return false;
    };
    let parts: Vec<&[u8]> = bytes.splitn(3, |byte| *byte == b'\n').collect();
    let token = match parts[..] {
        [one] => String::from_utf8_lossy(one).into_owned(),
        _ => parts
            .iter()
            .map(|part| URL_SAFE_NO_PAD.encode(part))
            .collect::<Vec<_>>()
            .join("."),
    };
    match JwtSvid::check(token.clone(), &id, "sts.amazonaws.com", now()) {
        Ok(svid) => {
            assert_eq!(
                (svid.spiffe_id(), svid.audience()),
                (&id, "sts.amazonaws.com")
            );
            assert!(svid.expires() >= now() + Duration::from_secs(30));
            assert!(!format!("{svid:?}").contains(&token));
            // The claims as another parser reads them.
            let claims = token
                .split('.')
                .nth(1)
                .and_then(|part| URL_SAFE_NO_PAD.decode(part).ok())
                .unwrap_or_default();
            let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap_or_default();
            assert_eq!(claims["sub"], id.as_str());
            assert!(
                claims["aud"] == "sts.amazonaws.com"
                    || claims["aud"] == serde_json::json!(["sts.amazonaws.com"])
            );
            assert!(claims["exp"].is_u64(), "{}", claims["exp"]);
            true
        }
        Err(error) => {
            // The texts are the daemon's own. The only names in them are those that the daemon
            // requested.
            let error = error.to_string();
            let secret = token
                .split('.')
                .find(|part| part.len() > 40 && error.contains(part));
            assert_eq!(secret, None, "{error}");
            false
        }
    }
}

fn configuration(text: &str) -> bool {
    let (problems, accepted) = match Config::parse(text, &|_| None) {
        Ok(loaded) => {
            let listen = &loaded.config.listen;
            assert!(listen.tcp.iter().all(|address| address.ip().is_loopback()));
            assert!(
                listen.max_connections_per_workload < listen.max_connections,
                "one could keep all others out"
            );
            assert!(!loaded.config.workloads.is_empty());
            (loaded.warnings, true)
        }
        Err(problems) => {
            assert!(!problems.is_empty());
            (problems, false)
        }
    };
    let lines = text.matches('\n').count() + 1;
    let numbers = problems.iter().filter_map(|problem| problem.line.as_ref());
    assert!(
        numbers
            .map(ConfigLine::number)
            .all(|number| (1..=lines).contains(&number))
    );
    accepted
}

fn spiffe_id(text: &str) -> bool {
    let (id, pattern) = (SpiffeId::parse(text), SpiffeIdPattern::parse(text));
    let accepted = id.is_ok() || pattern.is_ok();
    if let Ok(id) = id {
        assert_eq!(id.as_str(), text);
        assert!(
            id.segments()
                .all(|segment| !matches!(segment, "" | "." | "..")),
            "{text}"
        );
        assert!(
            text.bytes()
                .all(|c| c.is_ascii_alphanumeric() || b"._-:/".contains(&c)),
            "{text}"
        );
        let again = format!(
            "spiffe://{}/{}",
            id.trust_domain(),
            id.segments().collect::<Vec<_>>().join("/")
        );
        assert_eq!(again, text);
        let name = SessionName::of(&id);
        assert_eq!(SessionName::parse(name.as_str()).as_ref(), Ok(&name));
        assert!(
            SpiffeIdPattern::parse(text)
                .is_ok_and(|pattern| pattern.matches(&id) && pattern.exact() == Some(id))
        );
    }
    if let Ok(pattern) = pattern {
        assert_eq!(pattern.as_str(), text);
        // Replaces each wildcard by text that it matches.
        let filled = text.replace("**", "x/y").replace('*', "x");
        let Ok(id) = SpiffeId::parse(&filled) else {
            return accepted;
        };
        assert!(pattern.matches(&id), "{text} and {filled}");
        assert!(pattern.least_segments() <= id.segments().count());
        let longer = format!("{filled}/z");
        let covers = SpiffeId::parse(&longer).is_ok_and(|longer| pattern.matches(&longer));
        assert!(!covers || text.ends_with("/**"), "{text} and {longer}");
    }
    accepted
}

fn arn(text: &str) -> bool {
    let (arn, template) = (RoleArn::parse(text), ArnTemplate::parse(text));
    let (name, names) = (RoleArn::opaque(text), ArnTemplate::opaque(text));
    let accepted = arn.is_ok() || template.is_ok() || names.is_ok();
    let (Ok(id), Ok(deeper)) = (
        SpiffeId::parse("spiffe://example.org/a/b"),
        SpiffeId::parse("spiffe://example.org/a/b.c/d_e"),
    ) else {
        return accepted;
    };
    if let Ok(arn) = arn {
        assert!(text.starts_with("arn:") && text.contains(":role/"));
        assert!(arn.account().is_some_and(|account| account.len() == 12));
        // Names that AWS's rules accept are accepted without them.
        assert_eq!(name.as_ref(), Ok(&arn));
    }
    if let Ok(name) = name {
        assert_eq!(name.as_str(), text);
        assert_eq!(ArnTemplate::fixed(&name).render(&id), Some(name));
    }
    for (template, is_aws) in [(template, true), (names, false)] {
        let Ok(template) = template else { continue };
        assert_eq!(template.as_str(), text);
        if let Some(arn) = template.render(&deeper) {
            assert!(arn.is_aws() || !is_aws);
            assert!(template.highest_segment().is_none_or(|highest| highest < 3));
        }
    }
    accepted
}

fn endpoint(text: &str) -> bool {
    let Ok(endpoint) = Endpoint::parse(text) else {
        return false;
    };
    assert_eq!(Endpoint::parse(&endpoint.to_string()), Ok(endpoint));
    true
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const ROUNDS: usize = 20_000;

    /// Returns all seeds, in the order of their names.
    fn seeds() -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds");
        let entries = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let named =
            |path: std::path::PathBuf| (path.display().to_string(), std::fs::read(&path).unwrap());
        let mut seeds: Vec<_> = entries.map(named).collect();
        seeds.sort();
        seeds
    }

    fn damage(bytes: &mut Vec<u8>, other: &[u8], random: &mut fastrand::Rng) {
        // The first byte stays, because it selects the parser.
        let at = random.usize(1..=bytes.len());
        let end = at + random.usize(..=(bytes.len() - at).min(16));
        match random.u8(..5) {
            0 => drop(bytes.drain(at..end)),
            1 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            2 if at < bytes.len() => bytes[at] = random.u8(..),
            3 => {
                let from = random.usize(..other.len());
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
    fn properties_hold_for_the_seeds_and_for_damage_to_them() {
        let seed: u64 = std::env::var("AWSVID_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or(0x_a115_71d0);
        let mut random = fastrand::Rng::with_seed(seed);
        let seeds = seeds();
        for choice in b"dpmgrtcsae" {
            // Without this a property could hold because no input reaches it.
            let accepted = seeds
                .iter()
                .filter(|(_, bytes)| bytes.first() == Some(choice) && any(bytes))
                .count();
            assert!(accepted > 0, "no seed that {} takes", char::from(*choice));
        }
        let check = |what: &str, bytes: &[u8]| {
            let fine = std::panic::catch_unwind(|| any(bytes)).is_ok();
            assert!(
                fine,
                "AWSVID_SEED={seed}, {what}: {:?}",
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
