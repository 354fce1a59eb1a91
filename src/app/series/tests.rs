use std::collections::BTreeSet;

use super::*;

/// Returns the string literals between `from` and the next line that closes an indented block.
fn literals(source: &str, from: &str) -> BTreeSet<String> {
    let (_, rest) = source
        .split_once(from)
        .unwrap_or_else(|| panic!("no {from}"));
    let (block, _) = rest.split_once("\n    }\n").expect("the end of the block");
    let code = block
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let strings = code.flat_map(|line| line.split('"').skip(1).step_by(2));
    strings.map(str::to_owned).collect()
}

/// A new error kind has a label from the start only if it is in the list of its enum.
#[test]
fn lists_have_every_label_that_the_code_uses() {
    const REASON: &str = "fn reason(";
    let own = |reasons: Vec<&'static str>| reasons.into_iter().map(str::to_owned).collect();
    let requests = Protocol::ALL
        .into_iter()
        .flat_map(http::ends_without_credentials)
        .map(|(_, reason)| reason);
    let requests: BTreeSet<String> = own(requests.collect());
    let exchanges = ExchangeError::samples()
        .iter()
        .map(ExchangeError::reason)
        .collect();
    let exchanges: BTreeSet<String> = own(exchanges);
    let drops: BTreeSet<String> = own(http::drop_reasons().collect());
    let table = [
        (include_str!("../../caller/attest_error.rs"), &requests),
        (include_str!("../../http/error_response.rs"), &requests),
        (include_str!("../../http/metadata_response.rs"), &requests),
        (include_str!("../../role/denial.rs"), &requests),
        (include_str!("../../svid.rs"), &exchanges),
        (include_str!("../../exchange/error.rs"), &exchanges),
        (include_str!("../../http/connection_bounds.rs"), &drops),
    ];
    for (source, listed) in table {
        let used = literals(source, REASON);
        assert!(
            !used.is_empty() && used.is_subset(listed),
            "{used:?} in {listed:?}"
        );
    }
    let used = literals(include_str!("../../sts/reason.rs"), "fn label(");
    let listed: BTreeSet<_> = StsError::samples()
        .into_iter()
        .map(|error| error.reason.label().to_owned())
        .collect();
    assert_eq!(used, listed);
}

#[test]
fn each_family_has_its_series_from_the_start() {
    let metrics = Metrics::default();
    create(&metrics, false);
    metrics.add_sts("AWS in eu-central-1".to_owned());
    metrics.config_loaded("digest".to_owned(), std::time::SystemTime::UNIX_EPOCH);
    let text = metrics.exposition().text;
    let document = include_str!("../../../deploy/docs/metrics-and-alerts.md");
    let families = document.lines().filter_map(|line| {
        let (family, _) = line.strip_prefix("| `awsvid_")?.split_once('`')?;
        Some(format!("awsvid_{family}"))
    });
    let has_sample = |family: &str| {
        let is_sample = |line: &str| {
            let rest = line.strip_prefix(family);
            rest.is_some_and(|rest| rest.starts_with(['_', '{', ' ']))
        };
        text.lines().any(is_sample)
    };
    let without: Vec<String> = families.filter(|family| !has_sample(family)).collect();
    // There are no credentials yet.
    assert_eq!(without, ["awsvid_credentials_earliest_expiry_seconds"]);
    for series in [
        "awsvid_requests_total{listener=\"pod\",protocol=\"container\",outcome=\"refused\",reason=\"no_identity\"} 0\n",
        "awsvid_requests_total{listener=\"unix\",protocol=\"container\",outcome=\"failed\",reason=\"sts_unavailable\"} 0\n",
        "awsvid_requests_total{listener=\"tcp\",protocol=\"container\",outcome=\"issued\",reason=\"ok\"} 0\n",
        "awsvid_request_duration_seconds_count{cache=\"none\"} 0\n",
        "awsvid_connections_dropped_total{reason=\"slow_head\"} 0\n",
        "awsvid_source_calls_total{result=\"source_unavailable\"} 0\n",
        "awsvid_sts_calls_total{result=\"sts_access_denied\"} 0\n",
        "awsvid_sts_up{endpoint=\"AWS in eu-central-1\"} 0\n",
        "awsvid_exchanges_total{result=\"too_many_exchanges\"} 0\n",
        "awsvid_cache_requests_total{result=\"miss\"} 0\n",
        "awsvid_cache_evictions_total{reason=\"expired\"} 0\n",
        "awsvid_cache_entries{state=\"failing\"} 0\n",
        "awsvid_pod_listener_failures_total{reason=\"port_taken\"} 0\n",
    ] {
        assert!(text.contains(series), "{series} is not in {text}");
    }
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    assert!(
        series < 600,
        "{series} series of a daemon that has done nothing"
    );
}

#[test]
fn series_of_metadata_exist_only_where_it_is_served() {
    for serves_imds in [false, true] {
        let metrics = Metrics::default();
        create(&metrics, serves_imds);
        let text = metrics.exposition().text;
        for series in [
            "awsvid_requests_total{listener=\"pod\",protocol=\"imds\",outcome=\"issued\",reason=\"ok\"} 0\n",
            "awsvid_pod_listener_failures_total{reason=\"imds_routed\"} 0\n",
        ] {
            assert_eq!(text.contains(series), serves_imds, "{series}: {text}");
        }
        assert!(!text.contains("listener=\"unix\",protocol=\"imds\""));
    }
}
