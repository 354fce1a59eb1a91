//! Checks of a workload's environment: what an SDK uses before the container endpoint, what blocks
//! the way to it, and its response. Has to run as the workload: same user, same environment.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use hyper::Uri;
use serde_json::Value;

use super::report::CheckReport;
use crate::commands::https_probe::HttpProbe;
use crate::sdk_environment::profiles::{DEFAULT, ProfileTarget, Profiles};
use crate::sdk_environment::{HIGHER_PRECEDENCE_VARS, HigherPrecedence};

const CHAIN: &str = "chain";
const ENDPOINT: &str = "endpoint";
const PROXY: &str = "proxy";
const TOKEN: &str = "token";
const FULL: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
const TOKEN_VARIABLE: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN";
const TOKEN_FILE: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";
/// Variables that select the profile of an SDK.
const PROFILES: [&str; 2] = ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"];
/// Time limit of a request. The daemon holds a cold request for 4.5 s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(6);

pub(super) async fn check(env: &dyn Fn(&str) -> Option<String>, report: &mut CheckReport) {
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    check_precedence(&env, report);
    let Some(uri) = env(FULL) else {
        report.failed(
            ENDPOINT,
            format!("{FULL} is not set, so no SDK uses awsvid"),
            format!("export {FULL}=http://127.0.0.1:974/v1/credentials"),
        );
        return;
    };
    let Some(host) = address(&uri, report) else {
        return;
    };
    proxy(&env, &host, report);
    let Some(authorization) = authorization(&env, report) else {
        return;
    };
    let is_disabled =
        env("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    // `awsvid exec` sets it where the daemon serves metadata itself.
    let leads_to_awsvid = env("AWS_EC2_METADATA_SERVICE_ENDPOINT").is_some_and(|origin| {
        let path = uri.strip_prefix(origin.trim_end_matches('/'));
        path.is_some_and(|path| path.starts_with('/'))
    });
    if !is_disabled && !leads_to_awsvid {
        report.info(
            CHAIN,
            "an SDK that gets no credentials here tries those of an EC2 instance",
            "export AWS_EC2_METADATA_DISABLED=true",
        );
    }
    request_credentials(&uri, &authorization, report).await;
}

fn check_precedence(env: &impl Fn(&str) -> Option<String>, report: &mut CheckReport) {
    let mut clear = true;
    let is_set = |name: &str| env(name).is_some() && !PROFILES.contains(&name);
    for (name, preempts) in HIGHER_PRECEDENCE_VARS
        .into_iter()
        .filter(|(name, _)| is_set(name))
    {
        let fix = format!("unset {name}, or run the workload by awsvid exec");
        match preempts {
            HigherPrecedence::Alone(why) => {
                clear = false;
                report.failed(CHAIN, format!("{name} is set: {why}"), fix);
            }
            HigherPrecedence::WithOthers => report.info(
                CHAIN,
                format!("{name} is set, which is for other credentials"),
                fix,
            ),
            // Checked below.
            HigherPrecedence::IsSent => {}
        }
    }
    clear &= profiles_are_clear(env, report);
    if clear {
        report.ok(
            CHAIN,
            "nothing in the environment or in profiles comes before the container endpoint",
        );
    }
}

/// Reports whether each profile that an SDK uses by default leads to awsvid, or to no credentials.
fn profiles_are_clear(env: &impl Fn(&str) -> Option<String>, report: &mut CheckReport) -> bool {
    let profiles = Profiles::read(env);
    let profile_names = PROFILES
        .into_iter()
        .filter_map(|variable| Some((Some(variable), env(variable)?)));
    let default = env(PROFILES[0])
        .is_none()
        .then(|| (None, DEFAULT.to_owned()));
    let mut clear = true;
    for (variable, name) in profile_names.chain(default) {
        match (profiles.target(&name), variable) {
            (ProfileTarget::Nowhere, _) | (ProfileTarget::Missing, None) => {}
            (ProfileTarget::Awsvid, _) => {
                report.ok(CHAIN, "the profile that SDKs take leads to awsvid")
            }
            (ProfileTarget::Missing, Some(variable)) => {
                clear = false;
                let saw = format!("{variable} is set, and no profile has this name: SDKs fail");
                report.failed(
                    CHAIN,
                    saw,
                    format!("unset {variable}, or run the workload by awsvid exec"),
                );
            }
            (ProfileTarget::Elsewhere(keys), variable) => {
                clear = false;
                let keys: Vec<_> = keys
                    .iter()
                    .map(|(path, key)| format!("{key} in {}", path.display()))
                    .collect();
                let which = variable.map_or("the profile [default]".to_owned(), |name| {
                    format!("the profile of {name}")
                });
                let saw = format!(
                    "{which} has {}, which every SDK takes before awsvid's",
                    keys.join(", ")
                );
                report.failed(
                    CHAIN,
                    saw,
                    "remove that, or run the workload by awsvid exec, which gives the command another profile",
                );
            }
        }
    }
    clear
}

/// Returns the host, if every SDK accepts the URI.
fn address(uri: &str, report: &mut CheckReport) -> Option<String> {
    const FIX: &str = "write it as http://127.0.0.1:974/v1/credentials";
    let parsed = uri
        .parse()
        .ok()
        .filter(|parsed: &Uri| parsed.scheme().is_some());
    let host = parsed
        .as_ref()
        .and_then(Uri::host)
        .map(|host| host.trim_matches(['[', ']']).to_owned());
    let (Some(parsed), Some(host)) = (parsed, host) else {
        report.failed(
            ENDPOINT,
            format!("{FULL} is {uri:?}, which is not a URL"),
            FIX,
        );
        return None;
    };
    let address: Result<IpAddr, _> = host.parse();
    let table = [
        (
            !matches!(parsed.scheme_str(), Some("http")),
            "is not http: awsvid has no TLS, which loopback does not need",
        ),
        (
            matches!(parsed.path(), "" | "/"),
            "has no path, and the SDK for Java then sends no request",
        ),
        (
            parsed.query().is_some(),
            "has a query, which some SDKs drop",
        ),
        (
            address.is_err() && host != "localhost",
            "is a name, and SDKs take loopback addresses only",
        ),
        (
            address.is_ok_and(|ip| !ip.is_loopback()),
            "is not on loopback, and most SDKs reject that, but for two fixed addresses",
        ),
    ];
    for (_, what) in table.iter().filter(|(wrong, _)| *wrong) {
        report.failed(ENDPOINT, format!("{FULL}={uri} {what}"), FIX);
    }
    if table.iter().any(|(wrong, _)| *wrong) {
        return None;
    }
    if host != "127.0.0.1" {
        report.info(
            ENDPOINT,
            format!(
                "{FULL} has the host {host}: some SDKs accept 127.0.0.1 only, or resolve the name"
            ),
            FIX,
        );
    }
    Some(host)
}

fn proxy(env: &impl Fn(&str) -> Option<String>, host: &str, report: &mut CheckReport) {
    let set = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]
        .into_iter()
        .find(|name| env(name).is_some());
    let Some(set) = set else { return };
    // Some SDKs read only the one, some only the other.
    let lists = [env("no_proxy"), env("NO_PROXY")];
    let covers = |list: &String| {
        list.split(',')
            .any(|entry| matches!(entry.trim(), "*") || entry.trim() == host)
    };
    match lists.iter().all(|list| list.as_ref().is_some_and(covers)) {
        true => report.ok(PROXY, format!("{set} is set, and {host} is an exception")),
        false => report.failed(
            PROXY,
            format!("{set} is set, and requests for {host} may go to the proxy, and its loopback is another machine's"),
            format!("export NO_PROXY={host} no_proxy={host} (added to what they hold)"),
        ),
    }
}

/// Returns the token that an SDK would send. `None` if it has none, or an unusable one.
fn authorization(
    env: &impl Fn(&str) -> Option<String>,
    report: &mut CheckReport,
) -> Option<String> {
    if let Some(path) = env(TOKEN_FILE) {
        return match std::fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => {
                report.failed(
                    TOKEN,
                    format!("{path}, named by {TOKEN_FILE}, is empty"),
                    "point it at awsvid's `token_file`",
                );
                None
            }
            Ok(text) => {
                if text.contains(['\n', '\r']) {
                    let saw = format!(
                        "{path} has a line break in it: some SDKs reject it, others send it"
                    );
                    report.failed(
                        TOKEN,
                        saw,
                        "write it without one (printf, not echo), or point to awsvid's `token_file`",
                    );
                    return None;
                }
                report.ok(TOKEN, format!("{path} can be read"));
                Some(text)
            }
            Err(error) => {
                report.failed(
                    TOKEN,
                    format!("{path}, named by {TOKEN_FILE}: {error}"),
                    fix_for(&path),
                );
                None
            }
        };
    }
    let token = env(TOKEN_VARIABLE);
    match &token {
        Some(_) => report.ok(TOKEN, format!("{TOKEN_VARIABLE} is set")),
        None => report.failed(
            TOKEN,
            format!("neither {TOKEN_FILE} nor {TOKEN_VARIABLE} is set, and over TCP awsvid wants a header from clients that can set one"),
            format!("export {TOKEN_FILE}=/run/awsvid/token"),
        ),
    }
    token
}

fn fix_for(path: &str) -> String {
    match Path::new(path).exists() {
        true => "let this user read it: awsvid writes it with mode 0644".to_owned(),
        false => "start awsvid, and mount its directory here".to_owned(),
    }
}

async fn request_credentials(uri: &str, authorization: &str, report: &mut CheckReport) {
    report.show_progress(uri);
    let web = HttpProbe {
        resolve: Vec::new(),
        network: None,
        deadline: REQUEST_TIMEOUT,
    };
    let answer = match web.get_with(uri, Some(authorization)).await {
        Ok(answer) => answer,
        Err(error) => {
            report.failed(
                ENDPOINT,
                format!("{uri}: {error}"),
                "start awsvid (systemctl status awsvid), and use the port of `[listen] tcp`; a pod of gVisor or Kata has a loopback \
                 of its own, which awsvid is not in",
            );
            return;
        }
    };
    // The response has credentials in it. Only its other fields are ever printed.
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let text = |name: &str| body[name].as_str().unwrap_or_default();
    match answer.status {
        200 => report.ok(
            ENDPOINT,
            format!(
                "{uri} gives this process {} until {}",
                text("RoleArn"),
                text("Expiration")
            ),
        ),
        status => report.failed(
            ENDPOINT,
            format!(
                "{uri} answers {status} {}: {}",
                text("code"),
                text("message")
            ),
            "find the reason in deploy/docs/troubleshooting.md; on the node, run awsvid check",
        ),
    }
}

#[cfg(test)]
mod tests;
