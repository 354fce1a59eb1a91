//! Environment variables by which an SDK or the AWS CLI finds `dev` and its STS.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use crate::sdk_environment::Environment;

/// Variables that change the choice of the STS endpoint.
const OTHER_ENDPOINTS: [&str; 3] = [
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
];

/// Inputs for the variables.
#[derive(Debug, Clone, Copy)]
pub(super) struct Endpoints<'a> {
    /// TCP address of the daemon.
    pub(super) credentials: SocketAddr,
    /// Path of the daemon's token file.
    pub(super) token_file: &'a Path,
    pub(super) sts: &'a str,
    pub(super) region: &'a str,
}

/// Returns the variables. `inherited` reads those of this process. Reads the token file, which the
/// daemon has written.
///
/// Both variables of the token get one content. Old SDKs know only the variable with the token, and
/// one client uses the endpoint only with the file. If the two differed, each SDK would send
/// another token.
pub(super) fn environment(
    endpoints: &Endpoints<'_>,
    inherited: impl Fn(&str) -> Option<String>,
) -> io::Result<Environment> {
    let token = std::fs::read_to_string(endpoints.token_file)?;
    let uri = format!("http://{}/v1/credentials", endpoints.credentials);
    let mut environment = Environment::new((uri, None), "127.0.0.1", inherited);
    OTHER_ENDPOINTS
        .into_iter()
        .for_each(|name| environment.remove(name));
    environment.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", token);
    environment.set(
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        endpoints.token_file.display().to_string(),
    );
    environment.set("AWS_ENDPOINT_URL_STS", endpoints.sts);
    environment.set("AWS_REGION", endpoints.region);
    environment.set("AWS_DEFAULT_REGION", endpoints.region);
    // A `[default]` profile with keys takes precedence over the container endpoint in every chain.
    environment.set("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    environment.set("AWS_CONFIG_FILE", "/dev/null");
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn token_is_set_by_both_variables() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "t0ken-_A").unwrap();
        let endpoints = Endpoints {
            credentials: "127.0.0.1:974".parse().unwrap(),
            token_file: file.path(),
            sts: "http://127.0.0.1:8080",
            region: "us-east-1",
        };
        let environment = environment(&endpoints, |_| None).unwrap();
        let set: BTreeMap<_, _> = environment.variables().iter().cloned().collect();
        assert_eq!(
            set["AWS_CONTAINER_CREDENTIALS_FULL_URI"],
            "http://127.0.0.1:974/v1/credentials"
        );
        assert_eq!(set["AWS_CONTAINER_AUTHORIZATION_TOKEN"], "t0ken-_A");
        assert_eq!(
            set["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"],
            file.path().display().to_string()
        );
        assert!(
            environment.removed().contains(&"AWS_PROFILE")
                && environment.removed().contains(&OTHER_ENDPOINTS[0])
        );
        assert!(
            !environment
                .removed()
                .contains(&"AWS_CONTAINER_AUTHORIZATION_TOKEN")
        );
    }

    #[test]
    fn environment_needs_the_token_file() {
        let endpoints = Endpoints {
            credentials: "127.0.0.1:974".parse().unwrap(),
            token_file: Path::new("/nonexistent/token"),
            sts: "",
            region: "",
        };
        assert!(environment(&endpoints, |_| None).is_err());
    }
}
