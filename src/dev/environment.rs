//! The environment variables with which an SDK or the AWS CLI finds `dev`, and finds nothing else first.

use std::net::SocketAddr;
use std::path::Path;
use std::{fmt, io};

use tokio::process::Command;

/// What would make an SDK use other credentials, or another STS, than `dev`'s. All of these come before the container
/// endpoint in the default chains, or change how the STS endpoint is chosen.
const REMOVED: [&str; 14] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_CREDENTIAL_EXPIRATION",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ACCOUNT_ID",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
];
/// Where a proxy is set, loopback has to be named as an exception: a proxy's loopback is not this machine's.
const PROXIES: [&str; 6] = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];

/// What to set and what to remove.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    set: Vec<(&'static str, String)>,
}

/// What the variables are made from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoints<'a> {
    /// The daemon's TCP address.
    pub(super) credentials: SocketAddr,
    /// The daemon's token file.
    pub(super) token_file: &'a Path,
    /// The STS's URL.
    pub(super) sts: &'a str,
    /// Its region.
    pub(super) region: &'a str,
}

impl Environment {
    /// Makes the variables; `inherited` gives those of this process. Reads the token file, which the daemon has written.
    ///
    /// The token is given both ways with one content. Old SDKs know only the variable, one client uses the endpoint only
    /// with the file, and where the two differed it would depend on the SDK which one is sent.
    pub(super) fn new(endpoints: &Endpoints<'_>, inherited: impl Fn(&str) -> Option<String>) -> io::Result<Self> {
        let token = std::fs::read_to_string(endpoints.token_file)?;
        let mut set = vec![
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://{}/v1/credentials", endpoints.credentials)),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN", token),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", endpoints.token_file.display().to_string()),
            ("AWS_ENDPOINT_URL_STS", endpoints.sts.to_owned()),
            ("AWS_REGION", endpoints.region.to_owned()),
            ("AWS_DEFAULT_REGION", endpoints.region.to_owned()),
            // Else an SDK that gets no credentials here would look for those of an EC2 instance.
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
            // A `[default]` profile with keys comes before the container endpoint in every chain.
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null".to_owned()),
            ("AWS_CONFIG_FILE", "/dev/null".to_owned()),
        ];
        if PROXIES.iter().any(|name| inherited(name).is_some()) {
            let exceptions = inherited("no_proxy").or_else(|| inherited("NO_PROXY")).filter(|list| !list.is_empty());
            let exceptions = exceptions.map_or("127.0.0.1".to_owned(), |list| format!("{list},127.0.0.1"));
            set.extend([("NO_PROXY", exceptions.clone()), ("no_proxy", exceptions)]);
        }
        Ok(Self { set })
    }

    /// Gives a command this environment, on top of what it inherits.
    pub fn apply(&self, command: &mut Command) {
        REMOVED.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.envs(self.set.iter().map(|(name, value)| (name, value)));
    }
}

/// As lines for a POSIX shell.
impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "unset {}", REMOVED.join(" "))?;
        self.set.iter().try_for_each(|(name, value)| writeln!(f, "export {name}={}", quoted(value)))
    }
}

/// A word of a POSIX shell.
fn quoted(value: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"/:._-,".contains(&c);
    if !value.is_empty() && value.bytes().all(plain) {
        return value.to_owned();
    }
    format!("'{}'", value.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn environment(inherited: &[(&str, &str)], file: &Path) -> Environment {
        let endpoints = Endpoints {
            credentials: "127.0.0.1:974".parse().unwrap(),
            token_file: file,
            sts: "http://127.0.0.1:8080",
            region: "us-east-1",
        };
        let inherited: BTreeMap<&str, &str> = inherited.iter().copied().collect();
        Environment::new(&endpoints, |name| inherited.get(name).map(|&value| value.to_owned())).unwrap()
    }

    /// What a shell has in its environment after it has run the lines.
    async fn in_a_shell(lines: &str, before: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut shell = Command::new("sh");
        shell.arg("-uec").arg(format!("{lines}\nenv -0")).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        shell.envs(before.iter().copied());
        variables(shell).await
    }

    async fn variables(mut command: Command) -> BTreeMap<String, String> {
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let pairs = text.split('\0').filter_map(|variable| variable.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[tokio::test]
    async fn a_shell_and_a_command_get_the_same_and_lose_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("it's a token");
        std::fs::write(&file, "t0ken-_A").unwrap();
        let before: Vec<(&str, &str)> = REMOVED.iter().map(|name| (*name, "x")).chain([("HOME", "/h")]).collect();
        let environment = environment(&before, &file);

        let shell = in_a_shell(&environment.to_string(), &before).await;
        let mut command = Command::new("env");
        command.arg("-0").env_clear().envs(before.iter().copied());
        environment.apply(&mut command);
        let mut command = variables(command).await;
        // Of the shell's own making.
        command.extend(
            ["PATH", "PWD", "SHLVL", "_", "OLDPWD"]
                .iter()
                .filter_map(|name| shell.get(*name).map(|value| ((*name).to_owned(), value.clone()))),
        );
        assert_eq!(shell, command);

        assert!(REMOVED.iter().all(|name| !shell.contains_key(*name)), "{shell:?}");
        assert_eq!(shell["AWS_CONTAINER_CREDENTIALS_FULL_URI"], "http://127.0.0.1:974/v1/credentials");
        assert_eq!(shell["AWS_CONTAINER_AUTHORIZATION_TOKEN"], "t0ken-_A");
        assert_eq!(shell["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"], file.display().to_string());
        assert_eq!(shell["HOME"], "/h");
        assert!(!shell.contains_key("NO_PROXY"));
    }

    #[test]
    fn behind_a_proxy_loopback_becomes_an_exception() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let table = [
            (vec![("HTTPS_PROXY", "http://proxy:3128")], "127.0.0.1"),
            (vec![("http_proxy", "http://proxy:3128"), ("NO_PROXY", "a,b")], "a,b,127.0.0.1"),
            (vec![("ALL_PROXY", "http://proxy:3128"), ("NO_PROXY", "a"), ("no_proxy", "b")], "b,127.0.0.1"),
        ];
        for (inherited, expected) in table {
            let set: BTreeMap<_, _> = environment(&inherited, file.path()).set.into_iter().collect();
            assert_eq!((set["NO_PROXY"].as_str(), set["no_proxy"].as_str()), (expected, expected));
        }
    }

    #[test]
    fn without_the_token_file_there_is_no_environment() {
        let endpoints = Endpoints {
            credentials: "127.0.0.1:974".parse().unwrap(),
            token_file: Path::new("/nonexistent/token"),
            sts: "",
            region: "",
        };
        assert!(Environment::new(&endpoints, |_| None).is_err());
    }
}
