use super::*;

fn network(variables: &[(&str, &str)]) -> Result<Network, InvalidSetting> {
    Network::from_env(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
}

#[test]
fn the_environment_decides_on_proxies_and_endpoints() {
    let empty = network(&[]).unwrap();
    assert_eq!((&empty.https_proxy, &empty.http_proxy, &empty.no_proxy), (&None, &None, &None));
    assert_eq!((empty.fips, empty.dual_stack), (false, false));

    let full = network(&[
        ("HTTPS_PROXY", "http://one:3128"),
        ("https_proxy", "http://two:3128"),
        ("http_proxy", "three:3128"),
        ("no_proxy", "internal.example.org"),
        ("AWS_USE_FIPS_ENDPOINT", "True"),
        ("AWS_USE_DUALSTACK_ENDPOINT", "true"),
    ]);
    let full = full.unwrap();
    assert_eq!(full.https_proxy.as_deref(), Some("http://one:3128"));
    assert_eq!(full.http_proxy.as_deref(), Some("http://three:3128"));
    assert_eq!(full.no_proxy.as_deref(), Some("internal.example.org"));
    assert!(full.fips && full.dual_stack);

    let all = network(&[("ALL_PROXY", "http://all:1"), ("HTTP_PROXY", "http://http:1"), ("HTTPS_PROXY", "")]).unwrap();
    assert_eq!(all.https_proxy.as_deref(), Some("http://all:1"));
    assert_eq!(all.http_proxy.as_deref(), Some("http://http:1"));
    assert!(!network(&[("AWS_USE_FIPS_ENDPOINT", "false")]).unwrap().fips);
}

#[test]
fn wrong_values_are_named_but_not_quoted() {
    let table = [
        ("HTTPS_PROXY", "socks5://proxy-secret:1080"),
        ("HTTPS_PROXY", "http://user:proxy-secret@"),
        ("http_proxy", "http://user:proxy-secret@a b:1"),
        ("ALL_PROXY", "ftp://proxy-secret"),
        ("AWS_USE_FIPS_ENDPOINT", "proxy-secret"),
        ("AWS_USE_DUALSTACK_ENDPOINT", "proxy-secret"),
    ];
    for (name, value) in table {
        let error = network(&[(name, value)]).unwrap_err();
        assert!(error.0.contains(&name.to_ascii_uppercase()), "{name}={value}: {error}");
        assert!(!error.0.contains("secret"), "{error}");
    }
    let shown = format!("{:?}", network(&[("HTTPS_PROXY", "http://user:proxy-secret@proxy:1")]).unwrap());
    assert!(shown.contains("https_proxy: true") && !shown.contains("secret"), "{shown}");
}

#[test]
fn a_loopback_endpoint_has_no_proxy() {
    let network = network(&[("ALL_PROXY", "http://proxy:1")]).unwrap();
    for (endpoint, proxied) in [
        ("http://127.0.0.1:9000", false),
        ("http://127.9.9.9", false),
        ("https://[::1]:9000", false),
        ("http://localhost:9000", false),
        ("http://sts.localhost", false),
        ("https://minio.internal:9000", true),
        ("https://localhost.example.org", true),
        ("https://10.0.0.1", true),
    ] {
        assert_eq!(!network.proxy(&endpoint.parse().unwrap()).is_disabled(), proxied, "{endpoint}");
    }
}

#[test]
fn a_ca_file_is_read_before_the_sdk_sees_it() {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap().pem();
    let broken = certificate
        .lines()
        .map(|line| if line.starts_with("MI") { "AAAA" } else { line })
        .collect::<Vec<_>>()
        .join("\n");
    let table = [
        ("good.pem", certificate.clone(), None),
        ("two.pem", format!("# ours\n{certificate}{certificate}"), None),
        ("key.pem", key.serialize_pem(), Some("no certificate")),
        ("empty.pem", String::new(), Some("no certificate")),
        ("cut.pem", certificate[..certificate.len() / 2].to_owned(), Some("no valid PEM")),
        ("broken.pem", broken, Some("cannot be read")),
        (
            "half.pem",
            format!("{certificate}-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"),
            Some("no valid PEM"),
        ),
    ];
    for (name, content, reason) in table {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        match (read_ca(&path), reason) {
            (Ok(_), None) => {}
            (Err(error), Some(reason)) => {
                assert!(error.0.contains(reason) && error.0.contains(name), "{name}: {error}");
            }
            (result, _) => panic!("{name}: {:?}", result.map(|_| ())),
        }
    }
    let error = read_ca(&dir.path().join("absent.pem")).unwrap_err();
    assert!(error.0.contains("No such file"), "{error}");
}
