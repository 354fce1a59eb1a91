use super::*;

type Variables<'a> = &'a [(&'a str, &'a str)];

fn network(variables: Variables<'_>) -> NetworkSettings {
    NetworkSettings::from_env(|name| {
        variables
            .iter()
            .find(|(existing, _)| *existing == name)
            .map(|(_, value)| (*value).to_owned())
    })
}

/// Returns the proxy for calls to this URL as `host:port`, or the error.
fn hop(variables: Variables<'_>, to: &str) -> Result<Option<String>, String> {
    let found = network(variables).hop(&to.parse().unwrap());
    found
        .map(|hop| hop.map(|hop| format!("{}:{}", hop.host, hop.port)))
        .map_err(|error| error.0)
}

#[test]
fn first_variable_that_is_set_names_the_proxy() {
    const STS: &str = "https://sts.eu-central-1.amazonaws.com";
    let table: [(Variables<'_>, &str, Option<&str>); 16] = [
        (&[], STS, None),
        (&[("HTTPS_PROXY", "http://a:1")], STS, Some("a:1")),
        (
            &[("HTTPS_PROXY", "http://a:1"), ("https_proxy", "http://b:1")],
            STS,
            Some("a:1"),
        ),
        (
            &[("https_proxy", "http://b:1"), ("ALL_PROXY", "http://c:1")],
            STS,
            Some("b:1"),
        ),
        (
            &[("HTTPS_PROXY", ""), ("https_proxy", "http://b:1")],
            STS,
            Some("b:1"),
        ),
        (
            &[("HTTPS_PROXY", "  "), ("ALL_PROXY", "http://c:1")],
            STS,
            Some("c:1"),
        ),
        (&[("all_proxy", "http://c:1")], STS, Some("c:1")),
        (&[("HTTP_PROXY", "http://d:1")], STS, None),
        (
            &[("HTTPS_PROXY", "http://a:1")],
            "http://sts.example.org",
            None,
        ),
        (
            &[("HTTP_PROXY", "http://d:1"), ("ALL_PROXY", "http://c:1")],
            "http://sts.example.org",
            Some("d:1"),
        ),
        (
            &[("http_proxy", "d:3128")],
            "http://sts.example.org",
            Some("d:3128"),
        ),
        (&[("HTTPS_PROXY", " a:3128 ")], STS, Some("a:3128")),
        (&[("HTTPS_PROXY", "http://a")], STS, Some("a:80")),
        (&[("HTTPS_PROXY", "HTTPS://a/")], STS, Some("a:443")),
        (
            &[("HTTPS_PROXY", "http://[2001:db8::1]:3128/x?y#z")],
            STS,
            Some("2001:db8::1:3128"),
        ),
        (
            &[
                ("HTTPS_PROXY", "a:1"),
                ("NO_PROXY", ""),
                ("no_proxy", "*.amazonaws.com"),
            ],
            STS,
            None,
        ),
    ];
    for (variables, to, expected) in table {
        assert_eq!(
            hop(variables, to),
            Ok(expected.map(str::to_owned)),
            "{variables:?} to {to}"
        );
        let sdk = network(variables).proxy(&to.parse().unwrap()).unwrap();
        assert_eq!(
            sdk.is_disabled(),
            expected.is_none(),
            "{variables:?} to {to}"
        );
    }
}

/// `ALL_PROXY` for the other programs of a terminal often names a SOCKS proxy.
#[test]
fn variable_is_an_error_only_where_it_is_used() {
    const STS: &str = "https://sts.eu-central-1.amazonaws.com";
    let socks = ("ALL_PROXY", "socks://proxy-secret:1080");
    assert_eq!(
        hop(&[socks, ("HTTPS_PROXY", "http://a:1")], STS),
        Ok(Some("a:1".to_owned()))
    );
    assert_eq!(hop(&[socks, ("NO_PROXY", "amazonaws.com")], STS), Ok(None));
    assert_eq!(hop(&[socks], "https://127.0.0.1:9000"), Ok(None));
    assert_eq!(hop(&[("HTTP_PROXY", "socks5://x:1")], STS), Ok(None));
    let table = [
        ("ALL_PROXY", "socks://proxy-secret:1080"),
        ("all_proxy", "socks5h://proxy-secret:1080"),
        ("HTTPS_PROXY", "socks5://proxy-secret:1080"),
        ("HTTPS_PROXY", "ftp://proxy-secret"),
        ("HTTPS_PROXY", "http://user:proxy-secret@"),
        ("https_proxy", "http://user:proxy-secret@a b:1"),
        ("HTTPS_PROXY", "http://user:proxy-secret@a:0"),
        ("HTTPS_PROXY", "http://user:proxy-secret@a:65536"),
        ("HTTPS_PROXY", "http://user:proxy-secret@a:"),
        ("HTTPS_PROXY", "http://user:proxy-secret@a:port"),
        ("HTTPS_PROXY", "http:///proxy-secret"),
    ];
    for (name, value) in table {
        let error = hop(&[(name, value)], STS).unwrap_err();
        assert!(
            error.contains(&format!("variable {name} ")) && !error.contains("secret"),
            "{name}={value}: {error}"
        );
        assert!(
            network(&[(name, value)])
                .proxy(&STS.parse().unwrap())
                .is_err(),
            "{name}={value}"
        );
    }
    let shown = format!(
        "{:?}",
        network(&[("HTTPS_PROXY", "http://user:proxy-secret@proxy:1")])
    );
    assert!(
        shown.contains("HTTPS_PROXY") && !shown.contains("secret"),
        "{shown}"
    );
}

#[test]
fn loopback_has_no_proxy() {
    for (to, proxied) in [
        ("http://127.0.0.1:9000", false),
        ("http://127.9.9.9", false),
        ("https://[::1]:9000", false),
        ("http://localhost:9000", false),
        ("http://LOCALHOST.:9000", false),
        ("http://sts.localhost", false),
        ("https://minio.internal:9000", true),
        ("https://localhost.example.org", true),
        ("https://10.0.0.1", true),
    ] {
        assert_eq!(
            hop(&[("ALL_PROXY", "http://proxy:1")], to)
                .unwrap()
                .is_some(),
            proxied,
            "{to}"
        );
    }
}

#[test]
fn password_is_taken_up_to_the_last_at_sign() {
    // (the URL, user and password)
    let table = [
        ("http://user:pass@proxy:1", "user:pass"),
        ("user:pass@proxy:1", "user:pass"),
        ("http://user@proxy:1", "user:"),
        ("http://user:p@ss@proxy:1", "user:p@ss"),
        ("http://us@er:p@@ss@proxy:1", "us@er:p@@ss"),
        ("http://user:p%40ss@proxy:1", "user:p@ss"),
        ("http://user:p:s/s?s#s@proxy:1/", "user:p:s/s?s#s"),
        ("http://user:100%@proxy:1", "user:100%"),
        ("http://user:%zz%2@proxy:1", "user:%zz%2"),
        (
            "http://user:p s\"<>[]^`{|}\\@proxy:1",
            "user:p s\"<>[]^`{|}\\",
        ),
        ("http://user:pässwörd@proxy:1", "user:pässwörd"),
        ("http://user:p%25ss@proxy:1", "user:p%ss"),
    ];
    for (url, credentials) in table {
        let to = "https://sts.example.org".parse().unwrap();
        let hop = network(&[("HTTPS_PROXY", url)]).hop(&to).unwrap().unwrap();
        let expected = format!(
            "Basic {}",
            base64::Engine::encode(&base64::engine::general_purpose::STANDARD, credentials)
        );
        assert_eq!(
            hop.authorization
                .as_ref()
                .and_then(|value| value.to_str().ok()),
            Some(expected.as_str()),
            "{url}"
        );
        assert_eq!((hop.host.as_str(), hop.port), ("proxy", 1), "{url}");
        assert!(!format!("{hop:?} {hop}").contains("p@ss"), "{hop:?}");
    }
}

#[tokio::test]
async fn sts_url_is_the_called_host() {
    let (fips, dual_stack) = ((FIPS, "True"), (DUAL_STACK, "true"));
    let table: [(&str, Variables<'_>, &str); 14] = [
        (
            "eu-central-1",
            &[],
            "https://sts.eu-central-1.amazonaws.com",
        ),
        (
            "us-east-1",
            &[fips],
            "https://sts-fips.us-east-1.amazonaws.com",
        ),
        ("us-east-1", &[dual_stack], "https://sts.us-east-1.api.aws"),
        (
            "us-east-1",
            &[fips, dual_stack],
            "https://sts-fips.us-east-1.api.aws",
        ),
        (
            "us-east-1",
            &[(FIPS, "false"), (DUAL_STACK, "")],
            "https://sts.us-east-1.amazonaws.com",
        ),
        (
            "us-gov-west-1",
            &[],
            "https://sts.us-gov-west-1.amazonaws.com",
        ),
        (
            "us-gov-west-1",
            &[fips],
            "https://sts.us-gov-west-1.amazonaws.com",
        ),
        ("cn-north-1", &[], "https://sts.cn-north-1.amazonaws.com.cn"),
        (
            "cn-northwest-1",
            &[dual_stack],
            "https://sts.cn-northwest-1.api.amazonwebservices.com.cn",
        ),
        ("us-iso-east-1", &[], "https://sts.us-iso-east-1.c2s.ic.gov"),
        (
            "us-isob-east-1",
            &[],
            "https://sts.us-isob-east-1.sc2s.sgov.gov",
        ),
        (
            "eu-isoe-west-1",
            &[],
            "https://sts.eu-isoe-west-1.cloud.adc-e.uk",
        ),
        (
            "us-isof-south-1",
            &[],
            "https://sts.us-isof-south-1.csp.hci.ic.gov",
        ),
        (
            "eusc-de-east-1",
            &[],
            "https://sts.eusc-de-east-1.amazonaws.eu",
        ),
    ];
    for (region, variables, url) in table {
        let target = StsTarget {
            region: region.to_owned(),
            endpoint: None,
        };
        assert_eq!(
            network(variables).sts_url(&target).await.as_deref(),
            Ok(url),
            "{region} {variables:?}"
        );
    }
    // An endpoint is called as it is. A variable that does not apply may have any value.
    let endpoint = StsTarget {
        region: "x".to_owned(),
        endpoint: Some("https://minio.internal:9000".to_owned()),
    };
    let garbage = [(FIPS, "proxy-secret"), (DUAL_STACK, "proxy-secret")];
    assert_eq!(
        network(&garbage).sts_url(&endpoint).await.as_deref(),
        Ok("https://minio.internal:9000")
    );
    let aws = StsTarget {
        region: "us-east-1".to_owned(),
        endpoint: None,
    };
    for (name, value) in garbage {
        let error = network(&[(name, value)]).sts_url(&aws).await.unwrap_err().0;
        assert!(error.contains(name) && !error.contains("secret"), "{error}");
    }
    for region in ["", "not a region!"] {
        let target = StsTarget {
            region: region.to_owned(),
            endpoint: None,
        };
        let error = network(&[]).sts_url(&target).await.unwrap_err().0;
        assert!(error.contains("AWS has no STS in a region"), "{error}");
    }
}
