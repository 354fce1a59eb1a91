use super::*;

/// Parses these texts as config and credentials file.
fn profiles(config: &str, credentials: &str) -> Profiles {
    let mut profiles = Profiles::default();
    profiles.add(Kind::Config, "config".into(), config.to_owned());
    profiles.add(
        Kind::Credentials,
        "credentials".into(),
        credentials.to_owned(),
    );
    profiles
}

fn elsewhere(keys: &[&'static str]) -> Lead {
    Lead::Elsewhere(keys.iter().map(|key| ("config".into(), *key)).collect())
}

#[test]
fn profile_leads_to_the_source_of_its_credentials() {
    let role = "role_arn = arn:aws:iam::123456789012:role/x\n";
    let table = [
        (
            "[default]\nregion = eu-west-1\nca_bundle = /x\n",
            Lead::Nowhere,
        ),
        ("[ default ]\nregion = eu-west-1\n", Lead::Nowhere),
        (
            "[profile default]\nCredential_Process = /bin/x\n",
            elsewhere(&["credential_process"]),
        ),
        (
            "[default]\naws_access_key_id = A\naws_secret_access_key=S\n",
            elsewhere(&CREDENTIALS[..2]),
        ),
        (
            "[default]\n# role_arn = x\n; role_arn = x\ns3 =\n  role_arn = x\n",
            Lead::Nowhere,
        ),
        (
            "[default]\n[other]\nrole_arn = x\n[default]\nSSO_Session = y\n",
            elsewhere(&["sso_session"]),
        ),
        (
            "role_arn = x\n[sso-session default]\nsso_start_url = x\n",
            Lead::Missing,
        ),
        (
            "[default]\nsso_start_url = x\nsso_account_id = 1\n",
            elsewhere(&["sso_start_url"]),
        ),
        (
            "[default]\nlogin_session = x\n",
            elsewhere(&["login_session"]),
        ),
        (
            "[default]\ncredential_process = /usr/bin/awsvid credential-process --role x\n",
            Lead::Awsvid,
        ),
        (
            "[default]\ncredential_process = \"/opt/a/awsvid\" credential-process\n",
            Lead::Awsvid,
        ),
        (
            "[default]\ncredential_process = awsvid exec\n",
            elsewhere(&["credential_process"]),
        ),
        (
            "[default]\ncredential_process = /usr/bin/awsvid-not credential-process\n",
            elsewhere(&["credential_process"]),
        ),
        (
            "[default]\ncredential_process =\n",
            elsewhere(&["credential_process"]),
        ),
        (
            "[default]\ncredential_source = EcsContainer\n",
            elsewhere(&["credential_source"]),
        ),
        ("[other]\nrole_arn = x\n", Lead::Missing),
    ];
    for (config, expected) in table {
        assert_eq!(profiles(config, "").lead(DEFAULT), expected, "{config}");
    }
    let with_role = [
        ("credential_source = EcsContainer\n", Lead::Awsvid),
        (
            "credential_source = Ec2InstanceMetadata\n",
            elsewhere(&["role_arn", "credential_source"]),
        ),
        (
            "credential_source = Environment\n",
            elsewhere(&["role_arn", "credential_source"]),
        ),
        (
            "web_identity_token_file = /x\n",
            elsewhere(&["role_arn", "web_identity_token_file"]),
        ),
        ("", elsewhere(&["role_arn"])),
        // SDKs differ in which of two sources they prefer.
        (
            "credential_source = EcsContainer\naws_access_key_id = A\n",
            elsewhere(&["role_arn", "credential_source", "aws_access_key_id"]),
        ),
    ];
    for (more, expected) in with_role {
        assert_eq!(
            profiles(&format!("[default]\n{role}{more}"), "").lead(DEFAULT),
            expected,
            "{more}"
        );
    }
}

#[test]
fn chain_of_profiles_leads_to_the_source_of_its_end() {
    let link = |name: &str, source: &str| {
        format!("[profile {name}]\nrole_arn = x\nsource_profile = {source}\n")
    };
    let end = |name: &str, more: &str| format!("[profile {name}]\n{more}\n");
    let lead =
        |config: &[String], credentials: &str| profiles(&config.concat(), credentials).lead("a");
    let awsvid = "role_arn = x\ncredential_source = EcsContainer";
    let other = elsewhere(&["role_arn", "source_profile"]);
    assert_eq!(
        lead(&[link("a", "b"), link("b", "c"), end("c", awsvid)], ""),
        Lead::Awsvid
    );
    assert_eq!(
        lead(
            &[
                link("a", "b"),
                end("b", "credential_process = awsvid credential-process")
            ],
            ""
        ),
        Lead::Awsvid
    );
    assert_eq!(
        lead(&[link("a", "b"), end("b", "credential_process = x")], ""),
        other
    );
    assert_eq!(
        lead(&[link("a", "b")], "[b]\naws_access_key_id = A\n"),
        other
    );
    // SDKs take no credentials from the container endpoint for these.
    assert_eq!(lead(&[link("a", "b"), end("b", "region = x")], ""), other);
    assert_eq!(lead(&[link("a", "b")], ""), other);
    // Circles, which SDKs reject, and a reference to itself, which means the profile's own keys.
    assert_eq!(lead(&[link("a", "b"), link("b", "a")], ""), other);
    assert_eq!(lead(&[link("a", "a")], ""), other);
    // The keys may be in one file and the rest in the other.
    let split = profiles(
        "[profile a]\nrole_arn = x\ncredential_source = EcsContainer\n",
        "[a]\naws_access_key_id = A\n",
    );
    let Lead::Elsewhere(keys) = split.lead("a") else {
        panic!("{split:?}")
    };
    assert_eq!(keys[2], ("credentials".into(), "aws_access_key_id"));
}

#[test]
fn profile_names_are_parsed_as_sdks_do() {
    let all = profiles(
        "[profile \"two words\"]\nregion = a\n[services x]\nregion = b\n[plain]\nregion = c\n",
        "[k]\nregion = d\n",
    );
    for (name, region) in [
        ("two words", Some("a")),
        ("plain", Some("c")),
        ("k", Some("d")),
        ("x", None),
    ] {
        assert_eq!(all.region(name), region, "{name}");
        assert_eq!(all.lead(name) == Lead::Missing, region.is_none(), "{name}");
    }
}

#[test]
fn copy_has_all_keys_except_credentials() {
    let config = "# mine\n[default]\nregion = eu-west-1\nsso_session = x\nsso_account_id = 1\nca_bundle = /ca.pem\n\
        use_fips_endpoint = true\nendpoint_url = https://x\nservices = s\ns3 =\n  addressing_style = path\n\
        [sso-session x]\nsso_start_url = https://y\n[profile new]\nregion = old\n[services s]\nsts =\n  endpoint_url = https://z\n";
    let credentials = "[default]\naws_access_key_id = AKIA\nregion = us-east-1\noutput = json\n";
    let text = profiles(config, credentials).config_with("new", DEFAULT);
    let (kept, new) = text.split_once("[profile new]\n").unwrap();
    assert_eq!(
        kept,
        config.replace("[profile new]\nregion = old\n", ""),
        "no part of the file is hidden"
    );
    assert_eq!(
        new,
        "region = eu-west-1\nca_bundle = /ca.pem\nuse_fips_endpoint = true\nendpoint_url = https://x\nservices = s\n\
         s3 =\n  addressing_style = path\noutput = json\n"
    );
    let again = profiles(&text, credentials);
    assert_eq!(
        (again.lead("new"), again.region("new")),
        (Lead::Nowhere, Some("eu-west-1"))
    );
    assert_eq!(
        again.lead(DEFAULT),
        profiles(config, credentials).lead(DEFAULT)
    );
    assert_eq!(
        profiles("", "").config_with("new", DEFAULT),
        "[profile new]\n"
    );
}

#[test]
fn file_paths_are_those_of_sdks() {
    let with = |variables: &'static [(&str, &str)]| {
        path(FILES[0].0, FILES[0].1, |name| {
            variables
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, value)| (*value).to_owned())
        })
    };
    assert_eq!(with(&[("HOME", "/h")]), Some("/h/.aws/config".into()));
    assert_eq!(
        with(&[("HOME", "/h"), ("AWS_CONFIG_FILE", "~/c")]),
        Some("/h/c".into())
    );
    assert_eq!(with(&[("AWS_CONFIG_FILE", "/c")]), Some("/c".into()));
    assert_eq!(with(&[]), None);
}
