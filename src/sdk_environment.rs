//! Environment of a child process in which SDKs and the AWS CLI find awsvid, and find no other
//! credentials first.

pub mod profiles;

use std::fmt;
use std::process::Command;

use HigherPrecedence::{Alone, IsSent, WithOthers};

/// The way in which a variable keeps an SDK from awsvid, or changes its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HigherPrecedence {
    /// Sufficient by itself. The text names the SDKs and their behaviour.
    Alone(&'static str),
    /// Effective only with other variables. It is a sign that other credentials are intended.
    WithOthers,
    /// Sent to awsvid, with any value.
    IsSent,
}

const KEYS: &str =
    "every SDK takes keys from the environment first, and some fail with one half of a pair";
const LEGACY_VAR: &str = "older SDKs for Java, Go and Ruby take keys under this name";

/// Variables that take precedence over the container endpoint in the default chain of at least one
/// SDK, or change the request to it.
pub const HIGHER_PRECEDENCE_VARS: [(&str, HigherPrecedence); 21] = [
    ("AWS_ACCESS_KEY_ID", Alone(KEYS)),
    ("AWS_SECRET_ACCESS_KEY", Alone(KEYS)),
    (
        "AWS_SESSION_TOKEN",
        Alone("some SDKs add it to whatever keys they find"),
    ),
    (
        "AWS_SECURITY_TOKEN",
        Alone("older SDKs add it to whatever keys they find"),
    ),
    ("AWS_CREDENTIAL_EXPIRATION", WithOthers),
    ("AWS_ACCOUNT_ID", WithOthers),
    ("AWS_ACCESS_KEY", Alone(LEGACY_VAR)),
    ("AWS_SECRET_KEY", Alone(LEGACY_VAR)),
    ("AMAZON_ACCESS_KEY_ID", Alone(LEGACY_VAR)),
    ("AMAZON_SECRET_ACCESS_KEY", Alone(LEGACY_VAR)),
    ("AMAZON_SESSION_TOKEN", Alone(LEGACY_VAR)),
    (
        "AWS_CREDENTIAL_FILE",
        Alone("Python prefers keys from that file"),
    ),
    ("BOTO_CONFIG", Alone("Python prefers keys from that file")),
    (
        "AWS_PROFILE",
        Alone("every SDK takes that profile first, and fails if there is none of the name"),
    ),
    (
        "AWS_DEFAULT_PROFILE",
        Alone("the AWS CLI and Python take that profile first"),
    ),
    (
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        Alone("every SDK prefers to exchange that file's token itself"),
    ),
    ("AWS_ROLE_ARN", WithOthers),
    ("AWS_ROLE_SESSION_NAME", WithOthers),
    (
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        Alone("all SDKs but JavaScript's v3 and Go's v2 prefer it to the full URI"),
    ),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN", IsSent),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", IsSent),
];
/// Where SDKs find the instance metadata service, without a path: one of them drops it.
const METADATA_ENDPOINT: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT";
/// With `IPv6` an SDK takes another address than that.
const METADATA_MODE: &str = "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE";
/// Keeps an SDK from version 1 of that service.
const METADATA_V1_DISABLED: &str = "AWS_EC2_METADATA_V1_DISABLED";
/// Keeps an SDK from that service altogether.
const METADATA_DISABLED: &str = "AWS_EC2_METADATA_DISABLED";

/// Proxy variables. With one set, the endpoint has to be an exception, because a proxy's loopback
/// is another machine's.
const PROXIES: [&str; 6] = [
    "http_proxy",
    "HTTP_PROXY",
    "https_proxy",
    "HTTPS_PROXY",
    "all_proxy",
    "ALL_PROXY",
];

/// Variables to set and to remove.
#[derive(Debug, Clone)]
pub struct Environment {
    set: Vec<(&'static str, String)>,
    removed: Vec<&'static str>,
}

impl Environment {
    /// Returns the variables for the container credential endpoint `uri` on `host`, and for the
    /// instance metadata service at `metadata` if the daemon serves it. `inherited` reads the
    /// variables of this process.
    pub fn new(
        (uri, metadata): (String, Option<String>),
        host: &str,
        inherited: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let mut removed = HIGHER_PRECEDENCE_VARS.map(|(name, _)| name).to_vec();
        let mut set = vec![("AWS_CONTAINER_CREDENTIALS_FULL_URI", uri)];
        let mut host = host.to_owned();
        match metadata {
            Some(origin) => {
                // The AWS CLI version 2 adds paths without a slash.
                set.push((METADATA_ENDPOINT, origin + "/"));
                set.push((METADATA_V1_DISABLED, "true".to_owned()));
                // Programs that do not know the variable use the address.
                host.push_str(",169.254.169.254");
                removed.extend([METADATA_DISABLED, METADATA_MODE]);
            }
            None => {
                // Without this an SDK that gets no credentials here would try those of an EC2
                // instance.
                set.push((METADATA_DISABLED, "true".to_owned()));
                removed.extend([METADATA_ENDPOINT, METADATA_V1_DISABLED, METADATA_MODE]);
            }
        }
        if PROXIES.iter().any(|name| inherited(name).is_some()) {
            let exceptions = inherited("no_proxy")
                .or_else(|| inherited("NO_PROXY"))
                .filter(|list| !list.is_empty());
            let exceptions = exceptions.map_or(host.clone(), |list| format!("{list},{host}"));
            set.extend([("NO_PROXY", exceptions.clone()), ("no_proxy", exceptions)]);
        }
        Self { set, removed }
    }

    /// Sets another variable, too.
    pub fn set(&mut self, name: &'static str, value: impl Into<String>) {
        self.removed.retain(|removed| *removed != name);
        self.set.push((name, value.into()));
    }

    /// Leaves this variable as it is.
    pub fn keep(&mut self, name: &'static str) {
        self.removed.retain(|removed| *removed != name);
    }

    /// Removes another variable, too.
    pub fn remove(&mut self, name: &'static str) {
        self.removed.push(name);
    }

    /// Returns the variables to set, in this order. The last one of a name counts.
    pub fn variables(&self) -> &[(&'static str, String)] {
        &self.set
    }

    /// Returns the names of the variables to remove.
    pub fn removed(&self) -> &[&'static str] {
        &self.removed
    }

    /// Applies this environment to a command, on top of its inherited one.
    pub fn apply(&self, command: &mut Command) {
        self.removed.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.envs(self.set.iter().map(|(name, value)| (name, value)));
    }
}

/// Returns whether SDKs with these variables use the instance metadata service at `origin`, a URL
/// without a path.
pub fn leads_to_metadata(origin: &str, inherited: impl Fn(&str) -> Option<String>) -> bool {
    let is_disabled =
        inherited(METADATA_DISABLED).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let endpoint = inherited(METADATA_ENDPOINT);
    !is_disabled && endpoint.is_some_and(|endpoint| endpoint.trim_end_matches('/') == origin)
}

/// Lines for a POSIX shell that apply the environment.
impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "unset {}", self.removed.join(" "))?;
        self.set.iter().try_for_each(|(name, value)| {
            // Only a NUL cannot be quoted, which no variable has.
            let value = shlex::try_quote(value).map_err(|_| fmt::Error)?;
            writeln!(f, "export {name}={value}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn environment(inherited: &[(&str, &str)]) -> Environment {
        let inherited: BTreeMap<&str, &str> = inherited.iter().copied().collect();
        let inherited = |name: &str| inherited.get(name).map(|&value| value.to_owned());
        let uri = "http://127.0.0.1:974/v1/credentials".to_owned();
        Environment::new((uri, None), "127.0.0.1", inherited)
    }

    #[test]
    fn metadata_is_either_served_or_disabled() {
        let inherited = |name: &str| (name == "HTTP_PROXY").then(|| "http://a".to_owned());
        let environment = |metadata: Option<&str>| {
            let endpoints = (
                "http://a/v1/credentials".to_owned(),
                metadata.map(str::to_owned),
            );
            Environment::new(endpoints, "127.0.0.1", inherited)
        };
        let on = environment(Some("http://127.0.0.1:974"));
        let set: BTreeMap<_, _> = on.variables().iter().cloned().collect();
        assert_eq!(set[METADATA_ENDPOINT], "http://127.0.0.1:974/");
        assert_eq!(set[METADATA_V1_DISABLED], "true");
        assert_eq!(set["NO_PROXY"], "127.0.0.1,169.254.169.254");
        assert!(!set.contains_key(METADATA_DISABLED));
        assert!(on.removed().contains(&METADATA_DISABLED));
        let off = environment(None);
        let set: BTreeMap<_, _> = off.variables().iter().cloned().collect();
        assert_eq!(
            (&*set[METADATA_DISABLED], &*set["NO_PROXY"]),
            ("true", "127.0.0.1")
        );
        for name in [METADATA_ENDPOINT, METADATA_V1_DISABLED, METADATA_MODE] {
            assert!(off.removed().contains(&name), "{name}");
        }
    }

    /// Returns the environment of a shell that has run the lines.
    fn in_a_shell(lines: &str, before: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut shell = Command::new("sh");
        shell
            .arg("-uec")
            .arg(format!("{lines}\nenv -0"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap());
        shell.envs(before.iter().copied());
        variables(shell)
    }

    fn variables(mut command: Command) -> BTreeMap<String, String> {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let pairs = text
            .split('\0')
            .filter_map(|variable| variable.split_once('='));
        pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn shell_and_command_get_the_same_environment() {
        let before: Vec<(&str, &str)> = HIGHER_PRECEDENCE_VARS
            .iter()
            .map(|(name, _)| (*name, "x"))
            .chain([("HOME", "/h")])
            .collect();
        let mut environment = environment(&before);
        environment.set("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/a/it's a token");

        let shell = in_a_shell(&environment.to_string(), &before);
        let mut command = Command::new("env");
        command.arg("-0").env_clear().envs(before.iter().copied());
        environment.apply(&mut command);
        let mut command = variables(command);
        // Variables that the shell itself sets.
        command.extend(
            ["PATH", "PWD", "SHLVL", "_", "OLDPWD"]
                .iter()
                .filter_map(|name| {
                    shell
                        .get(*name)
                        .map(|value| ((*name).to_owned(), value.clone()))
                }),
        );
        assert_eq!(shell, command);

        let set = |name: &str| environment.variables().iter().any(|(set, _)| *set == name);
        assert!(
            HIGHER_PRECEDENCE_VARS
                .iter()
                .all(|(name, _)| set(name) == shell.contains_key(*name)),
            "{shell:?}"
        );
        assert_eq!(
            shell["AWS_CONTAINER_CREDENTIALS_FULL_URI"],
            "http://127.0.0.1:974/v1/credentials"
        );
        assert_eq!(
            shell["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"],
            "/a/it's a token"
        );
        assert_eq!(shell["HOME"], "/h");
        assert!(!shell.contains_key("NO_PROXY"));
    }

    #[test]
    fn endpoint_is_an_exception_of_proxies() {
        let table = [
            (vec![("HTTPS_PROXY", "http://proxy:3128")], "127.0.0.1"),
            (
                vec![("http_proxy", "http://proxy:3128"), ("NO_PROXY", "a,b")],
                "a,b,127.0.0.1",
            ),
            (
                vec![
                    ("ALL_PROXY", "http://proxy:3128"),
                    ("NO_PROXY", "a"),
                    ("no_proxy", "b"),
                ],
                "b,127.0.0.1",
            ),
        ];
        for (inherited, expected) in table {
            let set: BTreeMap<_, _> = environment(&inherited).set.into_iter().collect();
            assert_eq!(
                (set["NO_PROXY"].as_str(), set["no_proxy"].as_str()),
                (expected, expected)
            );
        }
    }
}
