//! The parsers of names and of the configuration.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::config::{Config, ConfigLine};
use crate::identity::{ArnTemplate, RoleArn, SessionName, SpiffeId, SpiffeIdPattern};
use crate::socket_endpoint::Endpoint;
use crate::svid::JwtSvid;

/// Returns 2026-01-01, the time at which the seeds are valid.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

/// Checks a JWT-SVID: header, claims and signature on a line each, or the encoded token on one
/// line.
pub(super) fn token(bytes: &[u8]) -> bool {
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

/// Checks a configuration file: an accepted one has the properties that the daemon relies on, and
/// each problem has a line of the file.
pub(super) fn configuration(text: &str) -> bool {
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

/// Checks a SPIFFE ID and a pattern: each prints as it was parsed, and a pattern matches the IDs
/// that its wildcards stand for.
pub(super) fn spiffe_id(text: &str) -> bool {
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

/// Checks the name of a role and a template of names.
pub(super) fn arn(text: &str) -> bool {
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

/// Checks the address of an agent: it prints to a text that reads back to the same address.
pub(super) fn endpoint(text: &str) -> bool {
    let Ok(endpoint) = Endpoint::parse(text) else {
        return false;
    };
    assert_eq!(Endpoint::parse(&endpoint.to_string()), Ok(endpoint));
    true
}
