//! The `[default]` profile in the files of SDKs and the AWS CLI: credentials in it come before the container endpoint.

use std::fs;
use std::path::{Path, PathBuf};

/// The variables that name the files, and where these are below HOME without them.
pub const FILES: [(&str, &str); 2] =
    [("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"), ("AWS_CONFIG_FILE", ".aws/config")];

/// Keys of a profile with which at least one SDK gets credentials.
const CREDENTIALS: [&str; 10] = [
    "aws_access_key_id",
    "aws_secret_access_key",
    "credential_process",
    "credential_source",
    "source_profile",
    "role_arn",
    "web_identity_token_file",
    "sso_session",
    "sso_start_url",
    "login_session",
];

/// What one file says in its `[default]` profile.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct DefaultProfile {
    /// The keys in it that give credentials; never their values.
    pub credentials: Vec<&'static str>,
    /// Its region.
    pub region: Option<String>,
}

/// The path of one of [`FILES`], by the variables of this process.
pub fn path(variable: &str, below_home: &str, inherited: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let home = inherited("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    match inherited(variable).filter(|path| !path.is_empty()) {
        Some(path) => match path.strip_prefix("~/") {
            Some(rest) => Some(home?.join(rest)),
            None => Some(path.into()),
        },
        None => Some(home?.join(below_home)),
    }
}

/// Reads a file's `[default]` profile. A file that this process can't read, its SDKs can't read either.
pub fn read(path: &Path) -> DefaultProfile {
    fs::read_to_string(path).map(|text| parse(&text)).unwrap_or_default()
}

fn parse(text: &str) -> DefaultProfile {
    let mut profile = DefaultProfile::default();
    let mut inside = false;
    // A line that is indented belongs to the key before it.
    for line in text.lines().filter(|line| !line.starts_with([' ', '\t', '#', ';'])) {
        if let Some(header) = line.strip_prefix('[') {
            let name = header.split(']').next().unwrap_or_default();
            let words: Vec<&str> = name.split_whitespace().map(|word| word.trim_matches(['"', '\''])).collect();
            inside = matches!(words[..], ["default"] | ["profile", "default"]);
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside) {
            let (key, value) = (key.trim(), value.trim());
            if let Some(known) = CREDENTIALS.iter().find(|known| known.eq_ignore_ascii_case(key)) {
                profile.credentials.push(known);
            } else if key.eq_ignore_ascii_case("region") && !value.is_empty() {
                profile.region = Some(value.to_owned());
            }
        }
    }
    profile
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_default_profile_counts_and_only_what_gives_credentials() {
        let table: [(&str, &[&str], Option<&str>); 7] = [
            ("[default]\naws_access_key_id = A\naws_secret_access_key=S\n", &CREDENTIALS[..2], None),
            ("[ default ]\nregion = eu-west-1\noutput = json\n", &[], Some("eu-west-1")),
            ("[profile default]\ncredential_process = /bin/x\nregion=a\n", &["credential_process"], Some("a")),
            ("[other]\naws_access_key_id = A\n[profile dev]\nregion = a\n", &[], None),
            ("[default]\n# role_arn = x\n; role_arn = x\ns3 =\n  role_arn = x\n", &[], None),
            ("[default]\n[other]\nrole_arn = x\n[default]\nSSO_Session = y\n", &["sso_session"], None),
            ("role_arn = x\n[sso-session default]\nsso_start_url = x\n", &[], None),
        ];
        for (text, credentials, region) in table {
            let found = parse(text);
            assert_eq!((&found.credentials[..], found.region.as_deref()), (credentials, region), "{text}");
        }
    }

    #[test]
    fn the_files_are_where_sdks_look() {
        let with = |variables: &'static [(&str, &str)]| {
            path(FILES[1].0, FILES[1].1, |name| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(with(&[("HOME", "/h")]), Some("/h/.aws/config".into()));
        assert_eq!(with(&[("HOME", "/h"), ("AWS_CONFIG_FILE", "~/c")]), Some("/h/c".into()));
        assert_eq!(with(&[("AWS_CONFIG_FILE", "/c")]), Some("/c".into()));
        assert_eq!(with(&[]), None);
    }
}
