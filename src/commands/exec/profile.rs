//! Replacement of profiles that lead to other credentials than awsvid's. The profile files stay
//! visible otherwise.
//!
//! The replacement has all settings of the profile except those that lead to credentials. It is
//! written to a copy of the config file. Nothing is copied from the credentials file, which
//! contains secrets.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::sdk_environment::Environment;
use crate::sdk_environment::profiles::{DEFAULT, ProfileTarget, Profiles};

/// Name of the replacement profile.
const PROFILE: &str = "awsvid-exec";
/// Variables that select the profile. Python and the AWS CLI read the second one first.
pub(super) const VARIABLES: [&str; 2] = ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"];
/// A directory in memory. Containers whose other directories are read-only have it.
const SHARED_MEMORY: &str = "/dev/shm";

/// A profile that leads to other credentials, and whose copy without them cannot be written.
#[derive(Debug, Error)]
#[error(
    "the profile [{name}], which would take precedence over awsvid, cannot be replaced: no directory for a copy of the \
     config file: {source}; set TMPDIR to a directory that only this user can write to, or remove {keys}"
)]
pub(super) struct UnreplacedProfile {
    name: String,
    /// The settings that lead to credentials, with their files.
    keys: String,
    source: io::Error,
}

/// Keeps each profile that leads to awsvid or to no credentials, and replaces each other one.
/// Returns whether the command gets a profile with a region.
///
/// Fails if a profile has to be replaced and its copy cannot be written. Without the copy the
/// command would lose settings, or use other credentials.
pub(super) fn replace(
    environment: &mut Environment,
    notes: &mut Vec<String>,
    inherited: &impl Fn(&str) -> Option<String>,
) -> Result<bool, UnreplacedProfile> {
    let temporary = [std::env::temp_dir(), SHARED_MEMORY.into()];
    replace_in(environment, notes, inherited, &temporary)
}

/// Does the same with `temporary` as the directories of temporary files.
pub(super) fn replace_in(
    environment: &mut Environment,
    notes: &mut Vec<String>,
    inherited: &impl Fn(&str) -> Option<String>,
    temporary: &[PathBuf],
) -> Result<bool, UnreplacedProfile> {
    let profiles = Profiles::read(inherited);
    let profile_names =
        VARIABLES.map(|variable| inherited(variable).filter(|name| !name.is_empty()));
    let mut used: Vec<&str> = Vec::new();
    for (variable, name) in VARIABLES
        .into_iter()
        .zip(profile_names.iter().map(Option::as_deref))
    {
        let Some(name) = name else { continue };
        if profiles.target(name) == ProfileTarget::Missing {
            notes.push(format!(
                "removed from the command's environment: {variable} (no profile has this name)"
            ));
        } else {
            environment.keep(variable);
            used.push(name);
        }
    }
    // Without AWS_PROFILE most SDKs use this one.
    if profile_names[0].is_none() || environment.removed().contains(&VARIABLES[0]) {
        used.push(DEFAULT);
    }
    let elsewhere = used.iter().find_map(|name| match profiles.target(name) {
        ProfileTarget::Elsewhere(keys) => Some((*name, keys)),
        ProfileTarget::Missing | ProfileTarget::Nowhere | ProfileTarget::Awsvid => None,
    });
    let Some((name, keys)) = elsewhere else {
        return Ok(used.iter().any(|name| profiles.region(name).is_some()));
    };
    let keys: Vec<_> = keys
        .iter()
        .map(|(file, key)| format!("{key} in {}", file.display()))
        .collect();
    let keys = keys.join(", ");
    let written = write(&profiles, name, &directories(inherited, temporary));
    let copy = written.map_err(|source| UnreplacedProfile {
        name: name.to_owned(),
        keys: keys.clone(),
        source,
    })?;
    // Python would prefer it to the replacement.
    VARIABLES
        .iter()
        .for_each(|variable| environment.remove(variable));
    notes.push(format!(
        "the command has the profile [{PROFILE}] instead of [{name}], which has {keys}, which would take precedence over \
         awsvid; all other settings are in {}",
        copy.display()
    ));
    environment.set("AWS_CONFIG_FILE", copy.display().to_string());
    environment.set("AWS_PROFILE", PROFILE);
    Ok(profiles.region(name).is_some())
}

/// Writes the copy of the config file. Each config file and profile has one copy, which later
/// commands reuse.
fn write(
    profiles: &Profiles,
    name: &str,
    directories: &[(PathBuf, String)],
) -> io::Result<PathBuf> {
    let directory = private_directory(directories)?;
    let config = profiles.config().unwrap_or(Path::new(""));
    let hash = Sha256::digest(format!("{}\0{name}", config.display()));
    let hash: String = hash
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let path = directory.join(format!("exec-{hash}.config"));
    let text = profiles.config_with(PROFILE, name);
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(path);
    }
    // A file per process, so that two commands that start together do not write to the same one.
    let new = directory.join(format!(".exec-{hash}.{}", std::process::id()));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, &path)?;
    Ok(path)
}

/// Returns the parents and names of possible directories for the copy, the best first.
fn directories(
    inherited: &impl Fn(&str) -> Option<String>,
    temporary: &[PathBuf],
) -> Vec<(PathBuf, String)> {
    let variable = |name: &str| {
        inherited(name)
            .filter(|value| value.starts_with('/'))
            .map(PathBuf::from)
    };
    let runtime = variable("XDG_RUNTIME_DIR").map(|base| (base, "awsvid".to_owned()));
    let cache =
        variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    let cache = cache.map(|base| (base, "awsvid".to_owned()));
    let temporary = temporary
        .iter()
        .map(|base| (base.clone(), format!("awsvid-{}", geteuid())));
    runtime.into_iter().chain(cache).chain(temporary).collect()
}

/// Returns the first directory that only this user can access: a config file can name a program
/// that the SDK runs.
pub(super) fn private_directory(directories: &[(PathBuf, String)]) -> io::Result<PathBuf> {
    let own = geteuid().as_raw();
    let mut failures = Vec::new();
    for (base, name) in directories {
        match private(base, name, own) {
            Ok(directory) => return Ok(directory),
            Err(error) => failures.push(format!("{}: {error}", base.display())),
        }
    }
    Err(io::Error::other(failures.join(", ")))
}

fn private(base: &Path, name: &str, own: u32) -> io::Result<PathBuf> {
    let others = || io::Error::other("other users could change it");
    DirBuilder::new().recursive(true).mode(0o700).create(base)?;
    let found = fs::metadata(base)?;
    let is_sticky = found.mode() & 0o1000 != 0;
    if ![0, own].contains(&found.uid()) || (found.mode() & 0o022 != 0 && !is_sticky) {
        return Err(others());
    }
    let directory = base.join(name);
    match DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(&directory)?;
    if found.is_dir() && found.uid() == own && found.mode() & 0o077 == 0 {
        Ok(directory)
    } else {
        Err(others())
    }
}
