//! The fuzz target for the files of SDKs, with arbitrary text.

use std::collections::BTreeSet;

use super::{Kind, ProfileTarget, Profiles};

/// Name of the profile that is added.
const NEW: &str = "awsvid-new";
/// Number of profiles that are compared with one another.
const MAX_PROFILES: usize = 6;

fn read(config: &str, credentials: &str) -> Profiles {
    let mut profiles = Profiles::default();
    profiles.add(Kind::Config, "config".into(), config.to_owned());
    profiles.add(
        Kind::Credentials,
        "credentials".into(),
        credentials.to_owned(),
    );
    profiles
}

/// Checks a config file and, after a NUL, a credentials file: a copy of a profile has its settings
/// and no credentials, and the other profiles stay as they are.
pub(crate) fn profiles(text: &str) -> bool {
    let (config, credentials) = text.split_once('\0').unwrap_or((text, ""));
    let before = read(config, credentials);
    let names: BTreeSet<&str> = before
        .sections
        .iter()
        .map(|section| section.profile.as_str())
        .filter(|name| *name != NEW)
        .take(MAX_PROFILES)
        .collect();
    for name in &names {
        match before.target(name) {
            ProfileTarget::Missing => panic!("{name} has a section"),
            ProfileTarget::Elsewhere(keys) => assert!(!keys.is_empty(), "{name}"),
            ProfileTarget::Nowhere | ProfileTarget::Awsvid => {}
        }
        let text = before.config_with(NEW, name);
        let after = read(&text, "");
        assert_eq!(
            after.target(NEW),
            ProfileTarget::Nowhere,
            "{name} in {text}"
        );
        // The first value counts, even an empty one.
        let region = before
            .entries(name)
            .find(|(_, entry)| entry.key == "region");
        let region = region.map_or("", |(_, entry)| &entry.value);
        assert_eq!(
            after.region(NEW).unwrap_or_default(),
            region,
            "{name} in {text}"
        );
        let after = read(&text, credentials);
        for other in &names {
            assert_eq!(
                after.target(other),
                before.target(other),
                "{other} in {text}"
            );
        }
    }
    !names.is_empty()
}
