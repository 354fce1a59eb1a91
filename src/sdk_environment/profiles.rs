//! The profiles in the files of SDKs and the AWS CLI, and the source of their credentials. A
//! profile's credentials take precedence over the container endpoint, and may come from it.
//!
//! The format is that of the AWS SDKs' "shared config and credentials files". SDKs differ in how
//! they treat a profile with keys of several kinds. So such a profile leads to awsvid only if each
//! of its kinds does.

use std::fs;
use std::path::{Path, PathBuf};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;

/// Variables with the paths of the files, and the default paths below HOME.
const FILES: [(&str, &str, Kind); 2] = [
    ("AWS_CONFIG_FILE", ".aws/config", Kind::Config),
    (
        "AWS_SHARED_CREDENTIALS_FILE",
        ".aws/credentials",
        Kind::Credentials,
    ),
];
/// Name of the profile that SDKs use by default.
pub const DEFAULT: &str = "default";

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
/// Keys that belong to those credentials only.
const DETAILS: [&str; 12] = [
    "aws_session_token",
    "aws_security_token",
    "aws_account_id",
    "aws_credential_scope",
    "role_session_name",
    "external_id",
    "mfa_serial",
    "duration_seconds",
    "sso_region",
    "sso_account_id",
    "sso_role_name",
    "sso_registration_scopes",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Config,
    Credentials,
}

/// Both files, as far as this process can read them. Its SDKs can read no more than that.
#[derive(Debug, Default)]
pub struct Profiles {
    config: Option<PathBuf>,
    config_text: String,
    sections: Vec<Section>,
}

/// Part of a file that belongs to one profile.
#[derive(Debug)]
struct Section {
    file: PathBuf,
    profile: String,
    entries: Vec<ProfileEntry>,
}

/// A key with its complete text: a nested value continues in indented lines.
#[derive(Debug)]
struct ProfileEntry {
    key: String,
    value: String,
    text: String,
}

/// Source of a profile's credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProfileTarget {
    /// No profile has this name.
    Missing,
    /// The profile has no credentials, so an SDK continues with the container endpoint.
    Nowhere,
    /// The credentials come from awsvid.
    Awsvid,
    /// The credentials come from elsewhere, at least for some SDKs, by these keys of these files.
    Elsewhere(Vec<(PathBuf, &'static str)>),
}

impl Profiles {
    /// Reads the files that the variables of this process name.
    pub fn read(inherited: impl Fn(&str) -> Option<String>) -> Self {
        let mut profiles = Self::default();
        for (variable, below_home, kind) in FILES {
            let Some(path) = path(variable, below_home, &inherited) else {
                continue;
            };
            let text = fs::read(&path)
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default();
            profiles.add(kind, path, text);
        }
        profiles
    }

    fn add(&mut self, kind: Kind, path: PathBuf, text: String) {
        self.sections.extend(sections(kind, &path, &text));
        if kind == Kind::Config {
            (self.config, self.config_text) = (Some(path), text);
        }
    }

    /// Returns the source of the credentials of the profile `name`.
    pub fn target(&self, name: &str) -> ProfileTarget {
        let mut visited = Vec::new();
        self.resolve(name, &mut visited)
    }

    fn resolve<'a>(&'a self, name: &'a str, visited: &mut Vec<&'a str>) -> ProfileTarget {
        if !self.sections.iter().any(|section| section.profile == name) {
            return ProfileTarget::Missing;
        }
        visited.push(name);
        let found: Vec<(&Section, &'static str)> = self
            .entries(name)
            .filter_map(|(section, entry)| Some((section, credential_key(&entry.key)?)))
            .collect();
        if found.is_empty() {
            return ProfileTarget::Nowhere;
        }
        let get = |key: &str| {
            self.entries(name)
                .find(|(_, entry)| entry.key == key)
                .map(|(_, entry)| entry.value.as_str())
        };
        let is_awsvids = |key: &'static str| match (key, get(key)) {
            ("credential_process", Some(command)) => is_awsvid(command),
            // A role that is assumed with credentials from the container endpoint.
            ("credential_source", Some(source)) => {
                source == "EcsContainer" && get("role_arn").is_some()
            }
            ("source_profile", Some(source)) => {
                get("role_arn").is_some()
                    && !visited.contains(&source)
                    && self.resolve(source, visited) == ProfileTarget::Awsvid
            }
            ("role_arn", Some(_)) => {
                get("credential_source").is_some() || get("source_profile").is_some()
            }
            _ => false,
        };
        let mut is_awsvids = is_awsvids;
        match found.iter().all(|(_, key)| is_awsvids(key)) {
            true => ProfileTarget::Awsvid,
            false => ProfileTarget::Elsewhere(
                found
                    .iter()
                    .map(|(section, key)| (section.file.clone(), *key))
                    .collect(),
            ),
        }
    }

    /// Returns the region of the profile `name`.
    pub fn region(&self, name: &str) -> Option<&str> {
        let region = self
            .entries(name)
            .find(|(_, entry)| entry.key == "region" && !entry.value.is_empty());
        region.map(|(_, entry)| entry.value.as_str())
    }

    /// Returns the path of the config file, which may not exist.
    pub fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Returns the text of the config file with the additional profile `new`: a copy of the profile
    /// `name` without the keys that lead to credentials.
    pub fn config_with(&self, new: &str, name: &str) -> String {
        let mut text = String::new();
        let mut is_new = false;
        // Drops a section of that name from an earlier run.
        for line in self.config_text.lines() {
            if line.starts_with('[') {
                is_new = profile_name(Kind::Config, line).as_deref() == Some(new);
            }
            if !is_new {
                text.extend([line, "\n"]);
            }
        }
        text.push_str(&format!("[profile {new}]\n"));
        let mut keys = Vec::new();
        for (_, entry) in self.entries(name) {
            let is_credentials =
                credential_key(&entry.key).is_some() || DETAILS.contains(&entry.key.as_str());
            if !is_credentials && !keys.contains(&&entry.key) {
                text.push_str(&entry.text);
                keys.push(&entry.key);
            }
        }
        text
    }

    fn entries(&self, name: &str) -> impl Iterator<Item = (&Section, &ProfileEntry)> {
        let of_profile = self
            .sections
            .iter()
            .filter(move |section| section.profile == name);
        of_profile.flat_map(|section| section.entries.iter().map(move |entry| (section, entry)))
    }
}

/// Returns the path of a file, by the variables of this process.
fn path(
    variable: &str,
    below_home: &str,
    inherited: impl Fn(&str) -> Option<String>,
) -> Option<PathBuf> {
    let home = inherited("HOME")
        .filter(|home| !home.is_empty())
        .map(PathBuf::from);
    match inherited(variable).filter(|path| !path.is_empty()) {
        Some(path) => match path.strip_prefix("~/") {
            Some(rest) => Some(home?.join(rest)),
            None => Some(path.into()),
        },
        None => Some(home?.join(below_home)),
    }
}

fn sections(kind: Kind, file: &Path, text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    let mut is_profile = false;
    for line in text.lines().filter(|line| !line.starts_with(['#', ';'])) {
        if line.starts_with('[') {
            let profile = profile_name(kind, line);
            is_profile = profile.is_some();
            sections.extend(profile.map(|profile| Section {
                file: file.to_owned(),
                profile,
                entries: Vec::new(),
            }));
            continue;
        }
        let Some(section) = sections.last_mut().filter(|_| is_profile) else {
            continue;
        };
        // An indented line belongs to the key before it.
        if line.starts_with([' ', '\t']) {
            if let Some(entry) = section.entries.last_mut() {
                entry.text.extend([line, "\n"]);
            }
        } else if let Some((key, value)) = line.split_once('=') {
            let (key, value) = (key.trim().to_ascii_lowercase(), value.trim().to_owned());
            section.entries.push(ProfileEntry {
                key,
                value,
                text: format!("{line}\n"),
            });
        }
    }
    sections
}

/// Returns the profile of a section. SDKs differ in whether the credentials file may have
/// `profile`, and in whether the config file may lack it. Each reading counts.
fn profile_name(kind: Kind, header: &str) -> Option<String> {
    let name = header.strip_prefix('[')?.split(']').next()?.trim();
    let (first, rest) = name
        .split_once([' ', '\t'])
        .map_or((name, ""), |(first, rest)| (first, rest.trim()));
    let bare = |name: &str| name.trim_matches(['"', '\'']).to_owned();
    match (first, rest) {
        ("", _) => None,
        ("profile", rest) if !rest.is_empty() => Some(bare(rest)),
        ("sso-session" | "services", rest) if kind == Kind::Config && !rest.is_empty() => None,
        _ => Some(bare(name)),
    }
}

fn credential_key(key: &str) -> Option<&'static str> {
    CREDENTIALS.into_iter().find(|known| *known == key)
}

/// Reports whether a command line is `awsvid credential-process`.
fn is_awsvid(command: &str) -> bool {
    let mut words = command
        .split_whitespace()
        .map(|word| word.trim_matches(['"', '\'']));
    let program = words.next().map(Path::new).and_then(Path::file_name);
    program.is_some_and(|name| name == "awsvid") && words.next() == Some("credential-process")
}

#[cfg(test)]
mod tests;
