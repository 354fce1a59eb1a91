use std::collections::BTreeMap;
use std::fs;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    exec: Exec,
}

/// `awsvid exec` with these arguments and `-- true`.
fn exec(arguments: &[&str]) -> Exec {
    Line::parse_from([&["exec"], arguments, &["--", "true"]].concat()).exec
}

fn prepared(arguments: &[&str], inherited: &[(&str, &str)]) -> (BTreeMap<&'static str, String>, Vec<String>) {
    let inherited: BTreeMap<&str, &str> = inherited.iter().copied().collect();
    let prepared = exec(arguments).prepare(|name| inherited.get(name).map(|&value| value.to_owned())).unwrap();
    (prepared.environment.variables().iter().cloned().collect(), prepared.notes)
}

const URL: [&str; 4] = ["--url", "http://127.0.0.1:974", "--token-file", "/dev/null"];

#[test]
fn urls_are_read_as_people_write_them_and_what_sdks_refuse_is_refused() {
    let good = [
        ("http://127.0.0.1:974", "http://127.0.0.1:974/v1/credentials"),
        ("http://127.0.0.1:974/", "http://127.0.0.1:974/v1/credentials"),
        ("http://127.0.0.1:974/v1/credentials/", "http://127.0.0.1:974/v1/credentials"),
        ("http://[::1]:974", "http://[::1]:974/v1/credentials"),
        ("http://localhost:974", "http://localhost:974/v1/credentials"),
        ("http://169.254.170.23/v1/credentials/x", "http://169.254.170.23/v1/credentials/x"),
        ("https://node.example.org", "https://node.example.org/v1/credentials"),
    ];
    for (text, uri) in good {
        assert_eq!(endpoint(text).unwrap().uri, uri, "{text}");
    }
    assert_eq!(endpoint("http://[::1]:974").unwrap().host, "::1");
    for text in [
        "",
        "127.0.0.1:974",
        "/v1/credentials",
        "ftp://127.0.0.1",
        "http://10.0.0.1:974",
        "http://node.example.org",
        "http://127.0.0.1.example.org",
        "http://user@127.0.0.1",
        "http://127.0.0.1/?a=b",
    ] {
        let error = endpoint(text).unwrap_err();
        assert!(error.contains("http://127.0.0.1:974"), "{text}: {error}");
    }
}

#[test]
fn the_address_is_the_one_that_every_sdk_accepts() {
    let listen = |tcp: &[&str]| Listen {
        tcp: tcp.iter().map(|address| address.parse().unwrap()).collect(),
        ..Listen::default()
    };
    let uri = |tcp: &[&str]| loopback(&listen(tcp)).map(|url| url.uri);
    assert_eq!(uri(&["[::1]:974", "127.0.0.1:975"]).unwrap(), "http://127.0.0.1:975/v1/credentials");
    assert_eq!(uri(&["[::1]:974"]).unwrap(), "http://[::1]:974/v1/credentials");
    assert!(uri(&[]).unwrap_err().contains("credential-process"));
    assert!(uri(&["127.0.0.1:0"]).unwrap_err().contains("--url"));
}

#[test]
fn a_role_stands_in_the_path_as_one_segment() {
    assert_eq!(role_in_path("back-up_1.x").unwrap(), "back-up_1.x");
    assert_eq!(
        role_in_path("arn:aws:iam::123456789012:role/a").unwrap(),
        "arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fa"
    );
    for role in ["", ".", ".."] {
        assert!(role_in_path(role).is_err(), "{role:?}");
    }
}

#[test]
fn the_token_is_given_both_ways_or_any_will_do() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, "t0ken-_A").unwrap();
    let path = file.path().to_str().unwrap();
    let (set, _) = prepared(&["--url", "http://127.0.0.1:974", "--token-file", path], &[]);
    assert_eq!(set["AWS_CONTAINER_AUTHORIZATION_TOKEN"], "t0ken-_A");
    assert_eq!(set["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"], path);

    // A file that was named is needed; one with a line break would be refused by half of the SDKs.
    for content in ["", "t0ken\n"] {
        fs::write(&file, content).unwrap();
        let error = exec(&["--url", "http://127.0.0.1:974", "--token-file", path]).prepare(|_| None).err().unwrap();
        assert!(error.contains("it holds no token"), "{error}");
    }
    let mut environment = Environment::new(String::new(), "", |_| None);
    let absent = Listen { token_file: "/nonexistent/token".into(), ..Listen::default() };
    exec(&[]).give_token(&mut environment, &absent).unwrap();
    let set = environment.variables();
    assert!(set.contains(&("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any".to_owned())), "{set:?}");
    assert!(!set.iter().any(|(name, _)| *name == "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"));
    assert!(environment.removed().contains(&"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"), "an inherited one would count");
    let token = Listen { authorization: Authorization::Token, ..absent };
    assert!(exec(&[]).give_token(&mut environment, &token).is_err());
}

#[test]
fn what_comes_first_in_sdks_is_removed_and_named_without_its_value() {
    let inherited: Vec<(&str, &str)> = PREEMPTING.iter().map(|(name, _)| (*name, "s3cret")).collect();
    let (set, notes) = prepared(&URL[..2], &inherited);
    let [note] = &notes[..] else { panic!("{notes:?}") };
    for name in ["AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "_RELATIVE_URI"] {
        assert!(note.contains(name), "{name}: {note}");
    }
    assert!(!note.contains("s3cret"));
    assert_eq!(set["AWS_EC2_METADATA_DISABLED"], "true");
    assert!(prepared(&URL[..2], &[("AWS_RETRY_MODE", "standard")]).1.is_empty());
}

#[test]
fn a_default_profile_with_credentials_is_hidden_and_its_region_kept() {
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        fs::create_dir_all(home.path().join(".aws")).unwrap();
        fs::write(home.path().join(".aws").join(name), text).unwrap();
    };
    let inherited = [("HOME", home.path().to_str().unwrap())];
    write("credentials", "[default]\naws_access_key_id = AKIAEXAMPLE\n");
    write("config", "[default]\nregion = eu-west-1\n");
    let (set, notes) = prepared(&URL[..2], &inherited);
    assert_eq!(set["AWS_SHARED_CREDENTIALS_FILE"], "/dev/null");
    assert!(!set.contains_key("AWS_CONFIG_FILE") && !set.contains_key("AWS_REGION"), "{set:?}");
    assert!(notes[0].contains("aws_access_key_id") && !notes[0].contains("AKIAEXAMPLE"), "{notes:?}");

    write("credentials", "[other]\naws_access_key_id = AKIAEXAMPLE\n");
    write("config", "[default]\nregion = eu-west-1\ncredential_process = /bin/false\n");
    let (set, _) = prepared(&URL[..2], &inherited);
    assert!(!set.contains_key("AWS_SHARED_CREDENTIALS_FILE"));
    assert_eq!((set["AWS_CONFIG_FILE"].as_str(), set["AWS_REGION"].as_str()), ("/dev/null", "eu-west-1"));
    let (set, _) = prepared(&URL[..2], &[inherited[0], ("AWS_REGION", "us-west-2")]);
    assert!(!set.contains_key("AWS_REGION"), "the user's own counts");
}
