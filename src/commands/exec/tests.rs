use std::collections::BTreeMap;
use std::fs;

use clap::Parser;

use super::*;

#[derive(Parser)]
struct ExecLine {
    #[command(flatten)]
    exec: Exec,
}

/// Parses `awsvid exec` with these arguments and `-- true`.
fn exec(arguments: &[&str]) -> Exec {
    ExecLine::parse_from([&["exec"], arguments, &["--", "true"]].concat()).exec
}

fn prepared(
    arguments: &[&str],
    inherited: &[(&str, &str)],
) -> (BTreeMap<&'static str, String>, Vec<String>) {
    let inherited: BTreeMap<&str, &str> = inherited.iter().copied().collect();
    let prepared = exec(arguments)
        .prepare(|name| inherited.get(name).map(|&value| value.to_owned()))
        .unwrap();
    (
        prepared.environment.variables().iter().cloned().collect(),
        prepared.notes,
    )
}

const URL: [&str; 4] = ["--url", "http://127.0.0.1:974", "--token-file", "/dev/null"];

#[test]
fn endpoint_parses_lenient_urls_and_rejects_what_sdks_reject() {
    let good = [
        (
            "http://127.0.0.1:974",
            "http://127.0.0.1:974/v1/credentials",
        ),
        (
            "http://127.0.0.1:974/",
            "http://127.0.0.1:974/v1/credentials",
        ),
        (
            "http://127.0.0.1:974/v1/credentials/",
            "http://127.0.0.1:974/v1/credentials",
        ),
        ("http://[::1]:974", "http://[::1]:974/v1/credentials"),
        (
            "http://localhost:974",
            "http://localhost:974/v1/credentials",
        ),
        (
            "http://169.254.170.23/v1/credentials/x",
            "http://169.254.170.23/v1/credentials/x",
        ),
        (
            "https://node.example.org",
            "https://node.example.org/v1/credentials",
        ),
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
        let error = endpoint(text).unwrap_err().to_string();
        assert!(error.contains("http://127.0.0.1:974"), "{text}: {error}");
    }
}

#[test]
fn loopback_prefers_the_address_that_every_sdk_accepts() {
    let listen = |tcp: &[&str]| ListenConfig {
        tcp: tcp.iter().map(|address| address.parse().unwrap()).collect(),
        ..ListenConfig::default()
    };
    let uri = |tcp: &[&str]| loopback(&listen(tcp)).map(|url| url.uri);
    assert_eq!(
        uri(&["[::1]:974", "127.0.0.1:975"]).unwrap(),
        "http://127.0.0.1:975/v1/credentials"
    );
    assert_eq!(
        uri(&["[::1]:974"]).unwrap(),
        "http://[::1]:974/v1/credentials"
    );
    let error = |tcp: &[&str]| uri(tcp).unwrap_err().to_string();
    assert!(error(&[]).contains("credential-process"));
    assert!(error(&["127.0.0.1:0"]).contains("--url"));
}

#[test]
fn metadata_service_is_set_if_the_configuration_has_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    let set = |table: &str, more: &[&str]| {
        let listen = "[listen]\ntcp = [\"127.0.0.1:974\"]\ntoken_file = \"/nonexistent\"\n";
        fs::write(&path, format!("{listen}{table}")).unwrap();
        prepared(&[&["--config", &path], more].concat(), &[]).0
    };
    const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
    const ROLE: &str = "AWS_EC2_INSTANCE_PROFILE_NAME";
    let off = set("", &["--role", "backup"]);
    assert!(
        !off.contains_key(ENDPOINT) && !off.contains_key(ROLE),
        "{off:?}"
    );
    let on = "[imds]\nmode = \"endpoint\"\n";
    let without_role = set(on, &[]);
    assert_eq!(without_role[ENDPOINT], "http://127.0.0.1:974/");
    assert!(!without_role.contains_key(ROLE));
    assert_eq!(set(on, &["--role", "backup"])[ROLE], "backup");
    let by_arn = set(on, &["--role", "arn:aws:iam::123456789012:role/a"]);
    assert!(!by_arn.contains_key(ROLE), "{by_arn:?}");
}

/// The policy of `environment-imds` sets these variables in a pod, which has no configuration.
#[test]
fn metadata_service_is_kept_if_the_environment_leads_to_it() {
    const ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
    const V1_DISABLED: &str = "AWS_EC2_METADATA_V1_DISABLED";
    const DISABLED: &str = "AWS_EC2_METADATA_DISABLED";
    const ROLE: &str = "AWS_EC2_INSTANCE_PROFILE_NAME";
    let arguments = [&URL[..2], &["--role", "backup"]].concat();
    let set = |inherited: &[(&str, &str)]| prepared(&arguments, inherited).0;
    for endpoint in ["http://127.0.0.1:974/", "http://127.0.0.1:974"] {
        let kept = set(&[(ENDPOINT, endpoint), (V1_DISABLED, "true")]);
        assert_eq!(kept[ENDPOINT], "http://127.0.0.1:974/");
        assert_eq!(
            (&*kept[V1_DISABLED], &*kept[ROLE]),
            ("true", "backup"),
            "{endpoint}"
        );
        assert!(!kept.contains_key(DISABLED), "{kept:?}");
    }
    let elsewhere = (ENDPOINT, "http://127.0.0.1:975/");
    let switched_off = [(ENDPOINT, "http://127.0.0.1:974/"), (DISABLED, "TRUE")];
    for inherited in [&[elsewhere][..], &switched_off, &[(V1_DISABLED, "true")]] {
        let off = set(inherited);
        assert_eq!(off[DISABLED], "true", "{inherited:?}");
        for name in [ENDPOINT, ROLE] {
            assert!(!off.contains_key(name), "{name}: {inherited:?}");
        }
    }
}

#[test]
fn role_is_one_path_segment() {
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
fn token_is_set_by_both_variables_or_is_arbitrary() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, "t0ken-_A").unwrap();
    let path = file.path().to_str().unwrap();
    let (set, _) = prepared(
        &["--url", "http://127.0.0.1:974", "--token-file", path],
        &[],
    );
    assert_eq!(set["AWS_CONTAINER_AUTHORIZATION_TOKEN"], "t0ken-_A");
    assert_eq!(set["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"], path);

    // A file that the user gave is required. Half of the SDKs would reject a line break in it.
    for content in ["", "t0ken\n"] {
        fs::write(&file, content).unwrap();
        let error = exec(&["--url", "http://127.0.0.1:974", "--token-file", path])
            .prepare(|_| None)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("the content is not a token"), "{error}");
    }
    let mut environment = Environment::new((String::new(), None), "", |_| None);
    let absent = ListenConfig {
        token_file: "/nonexistent/token".into(),
        ..ListenConfig::default()
    };
    exec(&[]).set_token(&mut environment, &absent).unwrap();
    let set = environment.variables();
    assert!(
        set.contains(&("AWS_CONTAINER_AUTHORIZATION_TOKEN", "any".to_owned())),
        "{set:?}"
    );
    assert!(
        !set.iter()
            .any(|(name, _)| *name == "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    );
    assert!(
        environment
            .removed()
            .contains(&"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        "an inherited one would count"
    );
    let token = ListenConfig {
        authorization: AuthorizationMode::Token,
        ..absent
    };
    assert!(exec(&[]).set_token(&mut environment, &token).is_err());
}

#[test]
fn variables_with_precedence_are_removed_and_reported_without_values() {
    let inherited: Vec<(&str, &str)> = HIGHER_PRECEDENCE_VARS
        .iter()
        .map(|(name, _)| (*name, "s3cret"))
        .collect();
    let (set, notes) = prepared(&URL[..2], &inherited);
    let [note, profile, default_profile] = &notes[..] else {
        panic!("{notes:?}")
    };
    assert!(
        profile.contains("AWS_PROFILE") && default_profile.contains("AWS_DEFAULT_PROFILE"),
        "{notes:?}"
    );
    assert!(!notes.concat().contains("s3cret"));
    for name in [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "_RELATIVE_URI",
    ] {
        assert!(note.contains(name), "{name}: {note}");
    }
    assert!(!note.contains("s3cret"));
    assert_eq!(set["AWS_EC2_METADATA_DISABLED"], "true");
    assert!(
        prepared(&URL[..2], &[("AWS_RETRY_MODE", "standard")])
            .1
            .is_empty()
    );
}

/// A home directory with files below `.aws`.
struct Home(tempfile::TempDir);

impl Home {
    fn with(config: &str, credentials: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join(".aws")).unwrap();
        fs::write(home.path().join(".aws/config"), config).unwrap();
        fs::write(home.path().join(".aws/credentials"), credentials).unwrap();
        Self(home)
    }

    fn prepared(&self, more: &[(&str, &str)]) -> (PreparedCommand, BTreeMap<&'static str, String>) {
        let home = self.0.path().to_str().unwrap();
        let inherited: BTreeMap<&str, &str> = [("HOME", home)]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        let prepared = exec(&URL[..2])
            .prepare(|name| inherited.get(name).map(|&value| value.to_owned()))
            .unwrap();
        let set = prepared.environment.variables().iter().cloned().collect();
        (prepared, set)
    }
}

const KEYS: &str = "aws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = s3cret\n";
const CONTAINER: &str =
    "role_arn = arn:aws:iam::123456789012:role/x\ncredential_source = EcsContainer\n";

#[test]
fn profile_with_other_credentials_is_replaced_without_them() {
    let config =
        "[default]\nregion = eu-west-1\nca_bundle = /ca.pem\n[profile other]\nregion = x\n";
    for (config, credentials) in [
        (config.to_owned(), format!("[default]\n{KEYS}")),
        (
            config.replace(
                "[default]\n",
                "[default]\ncredential_process = /bin/false\n",
            ),
            String::new(),
        ),
        (
            config.replace("[default]\n", "[default]\nsso_session = x\n"),
            String::new(),
        ),
    ] {
        let home = Home::with(&config, &credentials);
        let (prepared, set) = home.prepared(&[("AWS_DEFAULT_PROFILE", "other")]);
        assert_eq!(set["AWS_PROFILE"], "awsvid-exec");
        let text = fs::read_to_string(&set["AWS_CONFIG_FILE"]).unwrap();
        assert!(text.starts_with(&config), "nothing is hidden: {text}");
        assert!(
            text.ends_with("[profile awsvid-exec]\nregion = eu-west-1\nca_bundle = /ca.pem\n"),
            "{text}"
        );
        assert!(
            !set.contains_key("AWS_SHARED_CREDENTIALS_FILE") && !set.contains_key("AWS_REGION"),
            "{set:?}"
        );
        assert!(
            prepared
                .environment
                .removed()
                .contains(&"AWS_DEFAULT_PROFILE")
        );
        let [note] = &prepared.notes[..] else {
            panic!("{:?}", prepared.notes)
        };
        assert!(
            note.contains("instead of [default]")
                && !note.contains("AKIA")
                && !note.contains("s3cret"),
            "{note}"
        );
        // The next command reuses the copy, and a nested command keeps it.
        assert_eq!(
            home.prepared(&[]).1["AWS_CONFIG_FILE"],
            set["AWS_CONFIG_FILE"]
        );
        let inner = [
            ("AWS_PROFILE", "awsvid-exec"),
            ("AWS_CONFIG_FILE", &*set["AWS_CONFIG_FILE"]),
        ];
        let (inner, again) = home.prepared(&inner);
        assert!(
            inner.notes.is_empty() && !again.contains_key("AWS_CONFIG_FILE"),
            "{:?}",
            inner.notes
        );
    }
}

#[test]
fn profiles_of_awsvid_or_without_credentials_are_kept() {
    let process = "credential_process = /usr/bin/awsvid credential-process\n";
    for lead in [CONTAINER, process, "region = eu-west-1\n"] {
        let home = Home::with(&format!("[default]\n{lead}[profile a]\n{lead}"), "");
        for variables in [
            &[][..],
            &[("AWS_PROFILE", "a")],
            &[("AWS_DEFAULT_PROFILE", "a")],
        ] {
            let (prepared, set) = home.prepared(variables);
            assert!(prepared.notes.is_empty(), "{lead}: {:?}", prepared.notes);
            assert!(
                !set.contains_key("AWS_CONFIG_FILE") && !set.contains_key("AWS_PROFILE"),
                "{set:?}"
            );
            assert!(
                variables
                    .iter()
                    .all(|(name, _)| !prepared.environment.removed().contains(name)),
                "{variables:?}"
            );
        }
    }
}

#[test]
fn profile_variable_overrides_the_default_profile() {
    let home = Home::with(
        &format!("[profile a]\n{CONTAINER}[profile b]\nregion = x\nsso_session = x\n"),
        &format!("[default]\n{KEYS}"),
    );
    let (prepared, set) = home.prepared(&[("AWS_PROFILE", "a")]);
    assert!(
        prepared.notes.is_empty() && !set.contains_key("AWS_CONFIG_FILE"),
        "{:?}",
        prepared.notes
    );
    let (prepared, set) = home.prepared(&[("AWS_PROFILE", "b")]);
    let text = fs::read_to_string(&set["AWS_CONFIG_FILE"]).unwrap();
    assert!(
        text.ends_with("[profile awsvid-exec]\nregion = x\n"),
        "{text}"
    );
    assert!(
        prepared.notes[0].contains("instead of [b]"),
        "{:?}",
        prepared.notes
    );
    // A missing profile would make each SDK fail.
    let (prepared, set) = home.prepared(&[("AWS_PROFILE", "ghost")]);
    assert!(
        prepared.notes[0].contains("AWS_PROFILE (no profile has this name)"),
        "{:?}",
        prepared.notes
    );
    // Without it SDKs would use [default], which leads elsewhere.
    assert!(
        prepared.notes[1].contains("instead of [default]"),
        "{:?}",
        prepared.notes
    );
    assert_eq!(set["AWS_PROFILE"], "awsvid-exec");
}

#[test]
fn command_is_not_started_if_no_copy_can_be_written() {
    let home = Home::with(
        "[default]\nregion = eu-west-1\n",
        &format!("[default]\n{KEYS}"),
    );
    // A file instead of each directory.
    let file = home.0.path().join("file");
    fs::write(&file, "").unwrap();
    let mut environment = Environment::new((String::new(), None), "", |_| None);
    let (mut notes, below) = (Vec::new(), home.0.path().to_str().unwrap());
    let inherited = |name: &str| match name {
        "HOME" => Some(below.to_owned()),
        "XDG_RUNTIME_DIR" | "XDG_CACHE_HOME" => Some(file.to_str().unwrap().to_owned()),
        _ => None,
    };
    let mut replace = |temporary: &[PathBuf]| {
        profile::replace_in(&mut environment, &mut notes, &inherited, temporary)
    };
    let error = replace(std::slice::from_ref(&file))
        .unwrap_err()
        .to_string();
    for part in [
        "the profile [default], which would take precedence",
        &format!("{}: File exists", file.display()),
        "set TMPDIR to a directory that only this user can write to",
        "aws_access_key_id in ",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("s3cret"), "{error}");
    // The second directory of temporary files is used if the first one cannot be written to.
    let shared_memory = tempfile::tempdir().unwrap();
    assert!(replace(&[file.clone(), shared_memory.path().to_owned()]).unwrap());
    let set: BTreeMap<_, _> = environment.variables().iter().cloned().collect();
    assert!(
        Path::new(&set["AWS_CONFIG_FILE"]).starts_with(shared_memory.path())
            && !set.contains_key("AWS_SHARED_CREDENTIALS_FILE"),
        "{set:?}"
    );
}

/// A config file can name a program that the SDK runs, so no other user may have created its
/// directory.
#[test]
fn copy_is_written_only_to_a_private_directory() {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    let base = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap()
    };
    let private =
        |name: &str| profile::private_directory(&[(base.path().to_owned(), name.to_owned())]);
    mode(base.path(), 0o1777);
    let directory = private("made").unwrap();
    assert_eq!(
        fs::metadata(&directory).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(private("made").unwrap(), directory);
    for open in [0o777, 0o750, 0o701] {
        fs::create_dir(base.path().join(open.to_string())).unwrap();
        mode(&base.path().join(open.to_string()), open);
        assert!(private(&open.to_string()).is_err(), "{open:o}");
    }
    symlink(&directory, base.path().join("link")).unwrap();
    assert!(private("link").is_err());
    if crate::skip::root() {
        fs::create_dir(base.path().join("other")).unwrap();
        mode(&base.path().join("other"), 0o700);
        chown(base.path().join("other"), Some(51_001), None).unwrap();
        assert!(private("other").is_err());
    }
    // Other users can rename the directory.
    mode(base.path(), 0o777);
    assert!(private("made").is_err());
}
