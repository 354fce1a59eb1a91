use std::collections::HashMap;

use super::super::doc_tables::assert_documented;
use super::super::report::{CheckFinding, Verdict};
use super::*;

/// Returns the failures of a workload with these variables in addition to correct ones. No process
/// listens at the endpoint.
async fn failures(variables: &[(&str, &str)]) -> Vec<String> {
    let mut all = HashMap::from([
        (FULL, "http://127.0.0.1:1/v1/credentials"),
        (TOKEN_VARIABLE, "any"),
        ("HOME", "/nonexistent"),
    ]);
    all.extend(variables.iter().copied());
    let mut report = CheckReport::new(true);
    check(
        &|name| all.get(name).map(|&value| value.to_owned()),
        &mut report,
    )
    .await;
    for finding in report.findings() {
        if let Some(fix) = &finding.fix {
            assert_documented(finding.step, &finding.saw, fix);
        }
    }
    let failed = report
        .findings()
        .iter()
        .filter(|finding| finding.verdict == Verdict::Failed);
    failed
        .map(|finding| finding.saw.clone())
        .filter(|saw| !saw.contains("no connection to 127.0.0.1:1"))
        .collect()
}

#[tokio::test]
async fn each_fault_is_reported_alone() {
    assert_eq!(failures(&[]).await, [""; 0]);
    for (name, preempts) in HIGHER_PRECEDENCE_VARS {
        if !matches!(preempts, HigherPrecedence::Alone(_)) {
            continue;
        }
        let found = failures(&[(name, "s3cret")]).await;
        assert!(
            matches!(&found[..], [one] if one.starts_with(name) && !one.contains("s3cret")),
            "{found:?}"
        );
        assert_eq!(
            failures(&[(name, "")]).await,
            [""; 0],
            "an empty one is none"
        );
    }
    let table = [
        (FULL, "", "no SDK uses"),
        (FULL, "https://127.0.0.1:1/v1/credentials", "is not http"),
        (FULL, "http://127.0.0.1:1", "has no path"),
        (FULL, "http://127.0.0.1:1/v1/credentials?x=y", "has a query"),
        (FULL, "http://awsvid.internal/v1/credentials", "is a name"),
        (FULL, "http://192.0.2.1/v1/credentials", "not on loopback"),
        (FULL, "nonsense", "not a URL"),
        ("http_proxy", "http://proxy:3128", "may go to the proxy"),
        (TOKEN_VARIABLE, "", "neither"),
        (TOKEN_FILE, "/nonexistent/token", "/nonexistent/token"),
    ];
    for (name, value, words) in table {
        let found = failures(&[(name, value)]).await;
        assert!(
            matches!(&found[..], [one] if one.contains(words)),
            "{name}={value}: {found:?}"
        );
    }
    let excepted = [
        ("HTTP_PROXY", "http://proxy"),
        ("NO_PROXY", "a, 127.0.0.1"),
        ("no_proxy", "*"),
    ];
    assert_eq!(failures(&excepted).await, [""; 0]);
    assert_eq!(
        failures(&excepted[..2]).await.len(),
        1,
        "some read only no_proxy"
    );
}

/// Variables that belong to other credentials only in combination are a note.
#[tokio::test]
async fn harmless_variables_are_a_note() {
    for (name, preempts) in HIGHER_PRECEDENCE_VARS {
        if preempts == HigherPrecedence::WithOthers {
            assert_eq!(failures(&[(name, "s3cret")]).await, [""; 0]);
            let mut report = CheckReport::new(true);
            check(
                &|variable| (variable == name).then(|| "s3cret".to_owned()),
                &mut report,
            )
            .await;
            let is = |finding: &CheckFinding| {
                finding.verdict == Verdict::Note
                    && finding.saw.starts_with(name)
                    && !finding.saw.contains("s3cret")
            };
            assert!(
                report.findings().iter().any(is),
                "{name}: {:?}",
                report.findings()
            );
        }
    }
}

#[tokio::test]
async fn profiles_and_token_files_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let table = [
        ("[default]\naws_access_key_id = AKIA\n", true),
        ("[profile default]\ncredential_process = x\n", true),
        ("[ default ]\ns3 =\n    role_arn = x\n", false),
        ("[default]\nregion = x\n", false),
        ("[other]\naws_access_key_id = AKIA\n", false),
        ("[default]\nregion = x\n[other]\nrole_arn = x\n", false),
    ];
    for (text, expected) in table {
        std::fs::write(path("config"), text).unwrap();
        let found = failures(&[("AWS_CONFIG_FILE", &path("config"))]).await;
        assert_eq!(!found.is_empty(), expected, "{text}: {found:?}");
        assert!(!found.iter().any(|one| one.contains("AKIA")), "{found:?}");
    }
    for (text, expected) in [("t0ken", 0), ("t0ken\n", 1), ("", 1)] {
        std::fs::write(path("token"), text).unwrap();
        let found = failures(&[(TOKEN_FILE, &path("token"))]).await;
        assert_eq!(found.len(), expected, "{text:?}: {found:?}");
        assert!(!found.iter().any(|one| one.contains("t0ken")), "{found:?}");
    }
}
