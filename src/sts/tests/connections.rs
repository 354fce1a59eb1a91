//! Connections to STS: certificates, proxies, environment variables.

use super::*;

#[tokio::test]
async fn private_ca_is_trusted_for_a_private_endpoint() {
    let dir = tempdir().unwrap();
    let (ca, tls) = fake::tls(&["127.0.0.1"]);
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, ca).unwrap();
    let server = FakeSts::start_with(Some(tls), |_, _| good()).await;
    let target = endpoint(format!("https://{}", server.address));
    let token = svid_for(&billing(), 300, 1);
    let trusting = sts(Settings {
        ca_file: Some(file.clone()),
        ..settings()
    });
    trusting.assume(&grant(&target), &token).await.unwrap();

    // Without the file, and with a file of another CA.
    let other = dir.path().join("other.pem");
    std::fs::write(&other, fake::tls(&["127.0.0.1"]).0).unwrap();
    for ca_file in [None, Some(other)] {
        let error = sts(Settings {
            ca_file,
            ..settings()
        })
        .assume(&grant(&target), &token)
        .await
        .unwrap_err();
        assert_kind(&error, RetryPolicy::Later, "sts_unreachable");
        assert!(error.to_string().contains("certificate"), "{error}");
    }
    // For another name than that of the certificate.
    let named = endpoint(format!("https://localhost:{}", server.address.port()));
    let error = trusting.assume(&grant(&named), &token).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert_eq!(
        server.received().len(),
        1,
        "no token went to a server that is not trusted"
    );

    // A missing file fails only the calls that need it. They succeed once it exists.
    let late = dir.path().join("late.pem");
    let waiting = sts(Settings {
        ca_file: Some(late.clone()),
        ..settings()
    });
    waiting.prepare(&[&target]).await.unwrap();
    let error = waiting.assume(&grant(&target), &token).await.unwrap_err();
    assert_kind(&error, RetryPolicy::Later, "sts_no_ca");
    assert!(
        error.what.contains(&target.endpoint.clone().unwrap()) && error.what.contains("late.pem"),
        "{error}"
    );
    std::fs::rename(&file, &late).unwrap();
    while let Err(error) = waiting.assume(&grant(&target), &token).await {
        assert_eq!(error.reason.label(), "sts_no_ca", "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A file without a certificate is a mistake. Only a call that needs it finds it.
    std::fs::write(&late, "").unwrap();
    let wrong = sts(Settings {
        ca_file: Some(late),
        ..settings()
    });
    wrong.prepare(&[&plain(&server)]).await.unwrap();
    assert!(
        wrong
            .prepare(&[&target])
            .await
            .unwrap_err()
            .0
            .contains("it has no certificate")
    );
}

/// The log limits errors by their text, so that of one cause must not change with the time.
#[tokio::test]
async fn error_about_expired_certificate_has_one_text() {
    let dir = tempdir().unwrap();
    let (ca, tls) = fake::tls_with(&["127.0.0.1"], |params| {
        params.not_after = rcgen::date_time_ymd(2020, 2, 1);
    });
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, ca).unwrap();
    let server = FakeSts::start_with(Some(tls), |_, _| good()).await;
    let client = sts(Settings {
        ca_file: Some(file),
        ..settings()
    });
    let target = endpoint(format!("https://{}", server.address));
    let token = svid_for(&billing(), 300, 1);
    let error = client.assume(&grant(&target), &token).await.unwrap_err();
    let text = error.to_string();
    let expected = "certificate expired on Sat, 01 Feb 2020 00:00:00 GMT";
    assert_eq!(text.matches("expired").count(), 1, "{text}");
    assert!(text.contains(expected) && !text.contains("ago"), "{text}");
}

#[tokio::test]
async fn prepare_checks_the_variables_of_a_target() {
    let aws = StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: None,
    };
    let near = endpoint("http://127.0.0.1:9".to_owned());
    let with = |variables: &[(&str, String)]| {
        sts(Settings {
            network: network(variables),
            ..settings()
        })
    };
    for (name, value) in [
        ("ALL_PROXY", "socks://x:1"),
        ("AWS_USE_FIPS_ENDPOINT", "maybe"),
    ] {
        let sts = with(&[(name, value.to_owned())]);
        sts.prepare(&[&near]).await.unwrap();
        let error = sts.prepare(&[&near, &aws]).await.unwrap_err().0;
        assert!(error.contains(name), "{error}");
        let error = sts
            .assume(&grant(&aws), &svid_for(&billing(), 300, 1))
            .await
            .unwrap_err();
        assert_kind(&error, RetryPolicy::Never, "sts_misconfigured");
        assert!(error.what.contains(name), "{error}");
    }
}

/// The proxy's name may resolve later. The error names the proxy.
#[tokio::test]
async fn proxy_that_does_not_resolve_is_an_outage() {
    let sts = sts(Settings {
        network: network(&[("HTTPS_PROXY", "http://proxy.invalid:3128".to_owned())]),
        ..settings()
    });
    let aws = StsTarget {
        region: "eu-central-1".to_owned(),
        endpoint: None,
    };
    sts.prepare(&[&aws]).await.unwrap();
    let error = sts
        .assume(&grant(&aws), &svid_for(&billing(), 300, 1))
        .await
        .unwrap_err();
    assert_kind(&error, RetryPolicy::Later, "sts_unreachable");
    let fragments = "STS at https://sts.eu-central-1.amazonaws.com did not answer through the proxy proxy.invalid:3128 (HTTPS_PROXY)";
    assert!(error.what.contains(fragments), "{error}");
}

#[tokio::test]
async fn aws_call_uses_the_proxy_and_not_the_private_ca() {
    let dir = tempdir().unwrap();
    let names = [
        "sts.eu-central-1.amazonaws.com",
        "sts-fips.us-east-1.amazonaws.com",
        "sts.us-east-1.api.aws",
        "sts.cn-north-1.amazonaws.com.cn",
    ];
    let (ca, tls) = fake::tls(&names);
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, ca).unwrap();
    let server = FakeSts::start_with(Some(tls), |_, _| good()).await;
    let proxy = FakeProxy::to(server.address).await;
    let url = format!("http://user:pass@{}", proxy.address);
    let on = || "true".to_owned();
    let table = [
        (vec![("HTTPS_PROXY", url.clone())], "eu-central-1", names[0]),
        (vec![("ALL_PROXY", url.clone())], "cn-north-1", names[3]),
        (
            vec![
                ("HTTPS_PROXY", url.clone()),
                ("AWS_USE_FIPS_ENDPOINT", on()),
            ],
            "us-east-1",
            names[1],
        ),
        (
            vec![
                ("HTTPS_PROXY", url.clone()),
                ("AWS_USE_DUALSTACK_ENDPOINT", on()),
            ],
            "us-east-1",
            names[2],
        ),
    ];
    let written = (vec![("HTTPS_PROXY", url.clone())], "eu-central-1", names[0]);
    let by_region = table.into_iter().map(|row| (row, None));
    let by_name = [(written, Some(format!("https://{}", names[0])))];
    for (number, ((variables, region, host), endpoint)) in by_region.chain(by_name).enumerate() {
        let sts = sts(Settings {
            ca_file: Some(file.clone()),
            network: network(&variables),
            ..settings()
        });
        let target = StsTarget {
            region: region.to_owned(),
            endpoint,
        };
        let error = sts
            .assume(&grant(&target), &svid_for(&billing(), 300, 1))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
        assert!(!error.to_string().contains("pass"), "{error}");
        let heads = proxy.heads();
        assert_eq!(heads.len(), number + 1);
        assert!(
            heads[number].starts_with(&format!("CONNECT {host}:443 ")),
            "{heads:?}"
        );
        // base64 of user:pass
        assert!(
            heads[number]
                .to_lowercase()
                .contains("proxy-authorization: basic dxnlcjpwyxnz"),
            "{heads:?}"
        );
    }
    assert!(
        server.received().is_empty(),
        "no token went to a server that is not trusted"
    );
}

#[tokio::test]
async fn private_endpoint_call_uses_the_proxy() {
    let dir = tempdir().unwrap();
    let (ca, tls) = fake::tls(&["sts.test.invalid", "127.0.0.1", "0.0.0.0"]);
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, ca).unwrap();
    let server = FakeSts::start_with(Some(tls), |_, _| good()).await;
    let proxy = FakeProxy::to(server.address).await;
    let url = format!("http://{}", proxy.address);
    let with = |variables: &[(&str, String)]| {
        sts(Settings {
            ca_file: Some(file.clone()),
            network: network(variables),
            ..settings()
        })
    };
    let token = svid_for(&billing(), 300, 1);
    let far = endpoint("https://sts.test.invalid".to_owned());
    let near = endpoint(format!("https://{}", server.address));

    with(&[("HTTPS_PROXY", url.clone())])
        .assume(&grant(&far), &token)
        .await
        .unwrap();
    assert!(
        proxy.heads()[0].starts_with("CONNECT sts.test.invalid:443 "),
        "{:?}",
        proxy.heads()
    );

    // 0.0.0.0 is this host too, though it is not a loopback address.
    let here = endpoint(format!("https://0.0.0.0:{}", server.address.port()));
    with(&[("HTTPS_PROXY", url.clone())])
        .assume(&grant(&here), &token)
        .await
        .unwrap();
    assert!(
        proxy.heads()[1].starts_with("CONNECT 0.0.0.0:"),
        "{:?}",
        proxy.heads()
    );
    let no_proxy = ("NO_PROXY", "example.org,0.0.0.0".to_owned());
    with(&[("HTTPS_PROXY", url.clone()), no_proxy])
        .assume(&grant(&here), &token)
        .await
        .unwrap();
    with(&[("HTTPS_PROXY", url)])
        .assume(&grant(&near), &token)
        .await
        .unwrap();
    assert_eq!(
        proxy.heads().len(),
        2,
        "neither what NO_PROXY names nor loopback goes through it"
    );
    assert_eq!(server.received().len(), 4);
}

/// The environment is set to lead an SDK elsewhere: this test starts itself with it.
#[test]
fn environment_and_profiles_do_not_redirect_the_call() {
    const CHILD: &str = "AWSVID_TEST_CHILD_STS";
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if let Ok(url) = std::env::var(CHILD) {
        let result = runtime.block_on(
            sts(settings()).assume(&grant(&endpoint(url)), &svid_for(&billing(), 300, 1)),
        );
        assert_eq!(result.unwrap().access_key_id, "ASIAEXAMPLE");
        return;
    }
    let dir = tempdir().unwrap();
    let (server, trap) = runtime.block_on(async {
        (
            FakeSts::start(|_, _| good()).await,
            FakeSts::start(|_, _| rejection(400, "ValidationError", "trap")).await,
        )
    });
    let elsewhere = format!("http://{}", trap.address);
    let profile = format!(
        "[default]\nregion = us-west-2\nendpoint_url = {elsewhere}\naws_access_key_id = AKIAPROFILE\n\
         aws_secret_access_key = x\nretry_mode = adaptive\nmax_attempts = 9\n"
    );
    for name in ["config", "credentials"] {
        std::fs::write(dir.path().join(name), &profile).unwrap();
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let name = "sts::tests::connections::environment_and_profiles_do_not_redirect_the_call";
    child.args(["--exact", name, "--nocapture"]).env_clear();
    child
        .env(CHILD, format!("http://{}", server.address))
        .env("HOME", dir.path());
    child.env("AWS_CONFIG_FILE", dir.path().join("config"));
    child.env(
        "AWS_SHARED_CREDENTIALS_FILE",
        dir.path().join("credentials"),
    );
    child
        .env("AWS_ACCESS_KEY_ID", "AKIAENVIRONMENT")
        .env("AWS_SECRET_ACCESS_KEY", "x");
    for name in [
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_STS",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ] {
        child.env(name, &elsewhere);
    }
    let output = runtime.block_on(async {
        tokio::process::Command::from(child)
            .kill_on_drop(true)
            .output()
            .await
    });
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    let received = server.received();
    assert_eq!(received.len(), 1);
    assert!(
        !received[0].headers.contains_key("authorization"),
        "{:?}",
        received[0].headers
    );
    assert!(trap.received().is_empty(), "{:?}", trap.received());
}
