use super::*;
use crate::clock::Clock;
use crate::sts::{BlockingCalls, NetworkSettings, Settings};
use crate::svid::WorkloadApi;

#[tokio::test(start_paused = true)]
async fn reason_is_logged_when_it_is_new_and_not_each_second() {
    let mut logged = LoggedReason::default();
    let mut lines = Vec::new();
    let mut seconds = async |reasons: &[&'static str], count: usize| {
        for reason in reasons.iter().cycle().take(count) {
            lines.extend(logged.is_new(reason).then_some(*reason));
            sleep(PROBE_INTERVAL).await;
        }
    };
    // One that stays, and another one after it.
    seconds(&["the listener"], 100).await;
    seconds(&["the source"], 100).await;
    // Two that alternate, for ten minutes.
    seconds(&["STS", "the source"], 600).await;
    // The one that stays in the end.
    seconds(&["STS: last"], 100).await;
    assert_eq!(lines[..3], ["the listener", "the source", "STS"]);
    assert!(
        lines.len() <= 2 + 5 + 600 / 30 + 1,
        "{} lines: {lines:?}",
        lines.len()
    );
    assert_eq!(lines.last(), Some(&"STS: last"), "{lines:?}");
}

#[test]
fn answer_distinguishes_attested_caller_from_unsupported_kernel() {
    let rejected = |code: &str| format!("{{\"code\":\"{code}\"}}");
    let table = [
        (404, String::new(), Some(ProbeAnswer::Attested)),
        (403, rejected(UNSUPPORTED), Some(ProbeAnswer::Unsupported)),
        (403, rejected("no_holder"), None),
        (503, rejected(UNSUPPORTED), None),
        (403, String::new(), None),
        (200, "{}".to_owned(), None),
    ];
    for (status, body, expected) in table {
        let classified = classify_reply(status, body.as_bytes());
        assert_eq!(classified, expected, "{status} {body:?}");
    }
}

#[test]
fn kernel_without_supported_listener_serves_no_caller() {
    let unix = || ProbeTarget::Unix(PathBuf::from("/a"));
    let with = |unsupported: Vec<ProbeTarget>, serves| ProbedListeners {
        unanswered: Vec::new(),
        unsupported,
        serves,
    };
    let table = [
        // TCP alone, and TCP with the unix socket.
        (with(vec![unix()], false), false, true),
        (with(vec![unix()], true), false, false),
        // Pods alone.
        (with(vec![], false), true, false),
        // A unix socket that rejects this process, which is in a container.
        (with(vec![unix()], false), true, false),
        // An address of a disabled family.
        (with(vec![], false), false, false),
    ];
    for (listeners, serves_pods, expected) in table {
        assert_eq!(
            listeners.serve_no_caller(serves_pods),
            expected,
            "{listeners:?} {serves_pods}"
        );
    }
}

#[test]
fn sts_of_requested_roles_is_probed_without_any_role() {
    let requested = "requested_roles.allow = [\"arn:aws:iam::123456789012:role/*\"]\n";
    let rest = "[identity]\nworkload_api_socket = \"unix:///a\"\naudience = \"a\"\n[sts]\nregion = \"eu-central-1\"\n\
                [[workload]]\nspiffe_id = \"spiffe://t/a\"\nuid = 1\n";
    let role = "[[role]]\nname = \"a\"\nspiffe_id = \"spiffe://t/a\"\nrole_arn = \"arn:aws:iam::123456789012:role/a\"\n";
    let other = "region = \"eu-north-1\"\n";
    for (text, regions) in [
        (format!("{requested}{rest}"), &["eu-central-1"][..]),
        (format!("{rest}{role}"), &["eu-central-1"]),
        (format!("{rest}{role}{other}"), &["eu-north-1"]),
        (
            format!("{requested}{rest}{role}{other}"),
            &["eu-north-1", "eu-central-1"],
        ),
    ] {
        let config = Config::parse(&text, &|_| None)
            .unwrap_or_else(|problems| panic!("{problems:?}"))
            .config;
        let (clock, metrics) = (Clock::system(), Metrics::default());
        let source = WorkloadApi::new(
            config.identity.workload_api_socket.clone(),
            Vec::new(),
            clock.clone(),
            metrics.clone(),
        );
        let network = NetworkSettings::from_env(|_| None);
        let settings = Settings {
            timeout: ANSWER_TIMEOUT,
            max_concurrent: 4,
            ca_file: None,
            network,
            blocking: BlockingCalls::default(),
        };
        let probes = ReadinessProbes::new(
            &config,
            Arc::new(source),
            Arc::new(Sts::new(settings.clone(), clock.clone())),
            Arc::new(RolesAnywhere::new(settings, clock)),
            metrics,
            FileThreads::default(),
        );
        let probed: Vec<_> = probes
            .targets
            .iter()
            .map(|target| target.region.as_str())
            .collect();
        assert_eq!(
            (probed, probes.audience.as_str()),
            (regions.to_vec(), "a"),
            "{text}"
        );
    }
}

#[test]
fn reason_is_one_line() {
    assert_eq!(
        one_line("STS:\n  \u{1b}[31mno\r\n\tmore\n"),
        "STS: [31mno more"
    );
}
