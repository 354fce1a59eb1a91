//! The limits of STS's parameters in awsvid, compared with AWS's own model of its service.
//!
//! The STS of `awsvid dev` has the same checks as awsvid, so it cannot find a wrong one.

use std::collections::HashMap;
use std::process::Command;

use awsvid::identity::SessionName;
use awsvid::role::parameters::{
    MAX_POLICY_CHARS, MAX_TAG_VALUE_CHARS, MAX_TAGS, check_external_id, check_policy,
    check_source_identity, check_tag_key, check_tag_value,
};
use serde::Deserialize;

use super::TIMEOUT;
use crate::harness::counterparts::process::run;
use crate::harness::counterparts::python;

const PROGRAM: &str = include_str!("limits.py");

/// Limits of one shape of the model.
#[derive(Deserialize)]
struct ShapeLimits {
    min: usize,
    max: Option<usize>,
    /// Ranges of the characters.
    accepted: Vec<(u32, u32)>,
}

impl ShapeLimits {
    fn accepts(&self, code: u32) -> bool {
        let next = self.accepted.partition_point(|(_, last)| *last < code);
        let range = self.accepted.get(next);
        range.is_some_and(|(first, _)| *first <= code)
    }
}

type Check = fn(&str) -> bool;

/// The shapes of texts, each with awsvid's check.
const CHECKS: [(&str, Check); 6] = [
    ("tagKeyType", |text| check_tag_key(text).is_ok()),
    ("tagValueType", |text| check_tag_value(text).is_ok()),
    ("externalIdType", |text| check_external_id(text).is_ok()),
    ("sourceIdentityType", |text| {
        check_source_identity(text).is_ok()
    }),
    ("roleSessionNameType", |text| {
        SessionName::parse(text).is_ok()
    }),
    ("sessionPolicyDocumentType", |text| {
        check_policy(text).is_ok()
    }),
];
/// The shapes of lists.
const LISTS: [&str; 2] = ["tagListType", "tagKeyListType"];

fn model() -> Option<HashMap<String, ShapeLimits>> {
    // The AWS CLI and its libraries have an interpreter of their own.
    let aws = python("aws")?;
    let mut command = Command::new(aws.with_file_name("python3"));
    command.args(["-c", PROGRAM]);
    command.args(CHECKS.map(|(shape, _)| shape)).args(LISTS);
    let output = run(command, b"", TIMEOUT).success("the model of STS");
    Some(serde_json::from_str(&output).unwrap())
}

#[test]
fn limits_are_those_of_awss_model() {
    let Some(model) = model() else {
        return;
    };
    for list in LISTS {
        assert_eq!(model[list].max, Some(MAX_TAGS), "{list}");
    }
    let max = |shape: &str| model[shape].max;
    assert_eq!(max("tagValueType"), Some(MAX_TAG_VALUE_CHARS));
    assert_eq!(max("sessionPolicyDocumentType"), Some(MAX_POLICY_CHARS));
    for (shape, check) in CHECKS {
        let limits = &model[shape];
        let max = limits.max.unwrap();
        // An empty policy is not one: the configuration requires a JSON object.
        let min = match shape {
            "sessionPolicyDocumentType" => 0,
            _ => limits.min,
        };
        for length in [min.saturating_sub(1), min, max, max + 1] {
            let is_accepted = (min..=max).contains(&length);
            assert_eq!(check(&"x".repeat(length)), is_accepted, "{shape} {length}");
        }
        for c in '\0'..=char::MAX {
            let code = u32::from(c);
            let by_model = limits.accepts(code);
            let by_awsvid = check(&format!("xx{c}"));
            // Outside ASCII, the tables of Unicode differ by their age, and STS has the last word.
            let is_control = c.is_ascii_control() && shape == "sessionPolicyDocumentType";
            assert!(by_awsvid || !by_model, "{shape} lacks {c:?}");
            assert!(
                by_model || !by_awsvid || !c.is_ascii() || is_control,
                "{shape} has {c:?}"
            );
        }
    }
}
