use super::*;

fn metrics() -> Metrics {
    let metrics = Metrics::default();
    metrics
        .requests
        .get_or_create(&RequestLabel {
            listener: "tcp",
            protocol: "container",
            outcome: "issued",
            reason: "ok",
        })
        .inc();
    for label in CacheLabel::ALL {
        metrics
            .request_duration
            .get_or_create(&label)
            .observe(0.001);
    }
    metrics.config_loaded("abc".to_owned(), UNIX_EPOCH + Duration::from_secs(7));
    metrics
}

#[test]
fn text_format_names_counters_by_their_samples() {
    let Exposition { openmetrics, text } = metrics().exposition();
    assert!(
        openmetrics.ends_with("\n# EOF\n") && !text.contains("# EOF"),
        "{text}"
    );
    assert!(
        openmetrics.contains("# TYPE awsvid_requests counter\n"),
        "{openmetrics}"
    );
    assert!(
        openmetrics.contains("# UNIT process_cpu_seconds seconds\n"),
        "{openmetrics}"
    );
    for line in [
        "# HELP awsvid_requests_total Requests by listener, protocol, outcome and reason.\n# TYPE awsvid_requests_total counter\n",
        "# TYPE awsvid_request_duration_seconds histogram\n",
        "# TYPE process_cpu_seconds_total counter\n",
        "# TYPE awsvid_config_last_reload_success_timestamp_seconds gauge\nawsvid_config_last_reload_success_timestamp_seconds 7\n",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    assert!(!text.contains("# UNIT"), "{text}");
    let samples = |text: &str| {
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(samples(&openmetrics), samples(&text));
}

#[test]
fn process_metrics_describe_this_process() {
    let text = Metrics::default().exposition().text;
    let value = |name: &str| -> f64 {
        let line = text
            .lines()
            .find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("{name} in {text}"))
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    };
    let now = std::time::SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs_f64();
    let age = now - value("process_start_time_seconds");
    assert!((-1.0..3600.0).contains(&age), "{age}");
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_virtual_memory_bytes") > value("process_resident_memory_bytes"));
    assert!(value("process_open_fds") >= 3.0 && value("process_threads") >= 1.0);
    assert!(value("process_max_fds") > value("process_open_fds"));
    assert!(value("process_cpu_seconds_total") >= 0.0);
}

#[test]
fn earliest_expiry_is_absent_without_credentials() {
    const NAME: &str = "awsvid_credentials_earliest_expiry_seconds";
    let metrics = Metrics::default();
    assert!(!metrics.encode().contains(NAME));
    metrics.set_earliest_expiry(Some(Duration::from_millis(90_500)));
    assert!(metrics.encode().contains(&format!("{NAME} 90\n")));
    metrics.set_earliest_expiry(None);
    assert!(!metrics.encode().contains(NAME));
}

#[test]
fn sts_that_a_reload_removed_has_no_state() {
    let metrics = Metrics::default();
    let call = |name: &str, outage: bool| UpstreamCall {
        name: name.to_owned(),
        result: CallLabel { result: "ok" },
        error: outage.then(|| LastError {
            text: String::new(),
            reason: "sts_unavailable",
            outage,
        }),
        took: Duration::from_millis(3),
        at: UNIX_EPOCH,
    };
    metrics.sts_call(call("AWS in a", false));
    metrics.sts_call(call("AWS in b", true));
    let up = |text: &str| metrics.encode().contains(text);
    assert!(up("awsvid_sts_up{endpoint=\"AWS in a\"} 1\n"));
    assert!(up("awsvid_sts_up{endpoint=\"AWS in b\"} 0\n"));
    metrics.remove_sts("AWS in a".to_owned());
    assert!(!up("AWS in a") && up("awsvid_sts_up{endpoint=\"AWS in b\"} 0\n"));
    assert_eq!(metrics.health.reports().1.len(), 1);
}
