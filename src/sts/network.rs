//! Hosts and proxies of exchanges, by the environment variables that all SDKs share.

use std::fmt;
use std::net::IpAddr;

use aws_sdk_sts::config::endpoint::{DefaultResolver, Params, ResolveEndpoint};
use aws_smithy_http_client::proxy::ProxyConfig;
use hyper::Uri;
use hyper::header::HeaderValue;
use hyper_util::client::proxy::matcher::Matcher;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use thiserror::Error;

use super::no_proxy;
use crate::config::host_suffixes;
use crate::role::{RolesAnywhereTarget, StsTarget};

const HTTPS_PROXY: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
const HTTP_PROXY: [&str; 4] = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
const FIPS: &str = "AWS_USE_FIPS_ENDPOINT";
const DUAL_STACK: &str = "AWS_USE_DUALSTACK_ENDPOINT";

/// Characters that a user name or password in a URL must escape (RFC 3986, section 3.2.1).
/// [`escaped`] handles `%`.
const USERINFO: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'/')
    .add(b':')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'@')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// A setting with which STS cannot be called. The text is for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct InvalidSetting(pub String);

/// The network settings. A variable is parsed when a call uses it, so an unused one is not an
/// error.
#[derive(Clone, Default)]
pub struct NetworkSettings {
    https_proxy: Option<Variable>,
    http_proxy: Option<Variable>,
    no_proxy: String,
    fips: String,
    dual_stack: String,
}

/// A variable that is set. Its value may have a password.
#[derive(Clone)]
struct Variable {
    name: &'static str,
    value: String,
}

impl NetworkSettings {
    /// Reads `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, `AWS_USE_FIPS_ENDPOINT` and
    /// `AWS_USE_DUALSTACK_ENDPOINT`. `lookup` returns a variable's value.
    ///
    /// The proxy variables may have lower-case names. As in Go's HTTP client, upper-case names win
    /// (in curl they lose), and an empty value counts as unset. `HTTPS_PROXY` and `HTTP_PROXY` win
    /// over `ALL_PROXY`.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let first = |names: &[&'static str]| {
            names.iter().find_map(|name| {
                let value = lookup(name).filter(|value| !value.trim().is_empty())?;
                Some(Variable {
                    name,
                    value: value.trim().to_owned(),
                })
            })
        };
        Self {
            https_proxy: first(&HTTPS_PROXY),
            http_proxy: first(&HTTP_PROXY),
            no_proxy: first(&["NO_PROXY", "no_proxy"])
                .map(|variable| variable.value)
                .unwrap_or_default(),
            fips: lookup(FIPS).unwrap_or_default(),
            dual_stack: lookup(DUAL_STACK).unwrap_or_default(),
        }
    }

    /// Returns the URL of calls for `target`, for the daemon, its errors and `awsvid check` alike.
    ///
    /// It is the target's endpoint if there is one. Otherwise it is AWS's endpoint of the region,
    /// by the SDK's table of partitions. Fails for a region that cannot be part of a host name, and
    /// for a variable that is neither `true` nor `false`.
    pub async fn sts_url(&self, target: &StsTarget) -> Result<String, InvalidSetting> {
        if let Some(endpoint) = &target.endpoint {
            return Ok(endpoint.clone());
        }
        let (fips, dual_stack) = (
            switch(FIPS, &self.fips)?,
            switch(DUAL_STACK, &self.dual_stack)?,
        );
        let params = Params::builder()
            .region(target.region.as_str())
            .use_fips(fips)
            .use_dual_stack(dual_stack)
            .build();
        let resolved = match params {
            Ok(params) => DefaultResolver::new().resolve_endpoint(&params).await.ok(),
            Err(_) => None,
        };
        let uri = resolved.and_then(|endpoint| endpoint.url().parse::<Uri>().ok());
        let uri = uri.filter(|uri| uri.host().is_some_and(|host| !host.is_empty()));
        // `Uri` prints an empty path as a slash.
        uri.map(|uri| uri.to_string().trim_end_matches('/').to_owned())
            .ok_or_else(|| {
                let kind = match (fips, dual_stack) {
                    (false, false) => "",
                    (true, false) => " with FIPS",
                    (false, true) => " with IPv6",
                    (true, true) => " with FIPS and IPv6",
                };
                InvalidSetting(format!(
                    "AWS has no STS{kind} in a region {:?}; correct `region`",
                    target.region
                ))
            })
    }

    /// Returns the URL of calls to an IAM Roles Anywhere: the target's endpoint, or AWS's endpoint
    /// of the region. Fails for a variable that is neither `true` nor `false`.
    pub fn roles_anywhere_url(
        &self,
        target: &RolesAnywhereTarget,
    ) -> Result<String, InvalidSetting> {
        if let Some(endpoint) = &target.endpoint {
            return Ok(endpoint.clone());
        }
        let service = match switch(FIPS, &self.fips)? {
            true => "rolesanywhere-fips",
            false => "rolesanywhere",
        };
        let [ipv4, dual_stack] = host_suffixes(&target.region);
        let suffix = match switch(DUAL_STACK, &self.dual_stack)? {
            true => dual_stack,
            false => ipv4,
        };
        Ok(format!("https://{service}.{}.{suffix}", target.region))
    }

    /// Returns the name of the proxy for calls to a URL, for messages.
    pub(crate) fn proxy_name(&self, url: &str) -> Option<String> {
        let hop = self.hop(&url.parse().ok()?);
        hop.ok().flatten().map(|hop| hop.to_string())
    }

    /// Returns the proxy for calls to `to`, if there is one. Fails if its variable does not name an
    /// HTTP proxy.
    pub fn hop(&self, to: &Uri) -> Result<Option<Proxy>, InvalidSetting> {
        let Some((variable, url)) = self.proxy_url(to)? else {
            return Ok(None);
        };
        // `proxy_url` has applied NO_PROXY already.
        let matcher = Matcher::builder().all(url).build();
        Ok(matcher
            .intercept(to)
            .and_then(|found| Proxy::of(variable, found.uri(), found.basic_auth())))
    }

    /// Returns the proxy configuration in the SDK's form.
    pub(super) fn proxy(&self, to: &Uri) -> Result<ProxyConfig, InvalidSetting> {
        let Some((variable, url)) = self.proxy_url(to)? else {
            return Ok(ProxyConfig::disabled());
        };
        ProxyConfig::all(url).map_err(|_| not_a_proxy(variable))
    }

    /// Returns the name of the variable, and its URL in the form of [`proxy_url`].
    fn proxy_url(&self, to: &Uri) -> Result<Option<(&'static str, String)>, InvalidSetting> {
        let is_http = to.scheme_str() == Some("http");
        let variable = if is_http {
            &self.http_proxy
        } else {
            &self.https_proxy
        };
        let Some(host) = to.host() else {
            return Ok(None);
        };
        let port = to.port_u16().unwrap_or(if is_http { 80 } else { 443 });
        // A proxy's loopback is not this node's.
        match variable {
            Some(variable)
                if !is_loopback(host) && !no_proxy::names(&self.no_proxy, host, port) =>
            {
                let url = proxy_url(&variable.value).ok_or_else(|| not_a_proxy(variable.name))?;
                Ok(Some((variable.name, url)))
            }
            _ => Ok(None),
        }
    }
}

/// HTTP proxy that forwards calls.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Name of the variable that sets it.
    pub variable: &'static str,
    /// True if the proxy itself needs TLS.
    pub secure: bool,
    /// Host name or address, without brackets.
    pub host: String,
    pub port: u16,
    /// Value for `Proxy-Authorization`. It is marked as sensitive, so that no debug output shows
    /// it.
    pub authorization: Option<HeaderValue>,
}

impl Proxy {
    fn of(variable: &'static str, uri: &Uri, authorization: Option<&HeaderValue>) -> Option<Self> {
        let secure = uri.scheme_str() == Some("https");
        Some(Self {
            variable,
            secure,
            host: uri.host()?.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            authorization: authorization.cloned(),
        })
    }
}

/// Prints the proxy's address and variable, without its password.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the proxy {}:{} ({})",
            self.host, self.port, self.variable
        )
    }
}

/// The values of proxies are not printed, since they may have a password.
impl fmt::Debug for NetworkSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetworkSettings")
            .field(
                "https_proxy",
                &self.https_proxy.as_ref().map(|variable| variable.name),
            )
            .field(
                "http_proxy",
                &self.http_proxy.as_ref().map(|variable| variable.name),
            )
            .field("no_proxy", &self.no_proxy)
            .field("fips", &self.fips)
            .field("dual_stack", &self.dual_stack)
            .finish()
    }
}

/// Returns the error for a variable. It does not quote the value, which may have a password.
fn not_a_proxy(variable: &str) -> InvalidSetting {
    InvalidSetting(format!(
        "the environment variable {variable} is not the URL of an HTTP proxy, the only supported kind; write it as in \
         http://proxy.example.org:3128, or name the host in NO_PROXY"
    ))
}

/// Parses a proxy's URL and escapes its user name and password, so that every parser reads it
/// alike. Without a scheme it is HTTP, as in curl.
fn proxy_url(value: &str) -> Option<String> {
    let (scheme, rest) = value.split_once("://").unwrap_or(("http", value));
    let scheme = scheme.to_ascii_lowercase();
    if !matches!(scheme.as_str(), "http" | "https") {
        return None;
    }
    // A password may have an unescaped `@` or `/`. The host follows the last `@`.
    let (userinfo, rest) = rest
        .rsplit_once('@')
        .map_or((None, rest), |(userinfo, rest)| (Some(userinfo), rest));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.parse::<Uri>().ok()?;
    let host = host.host().filter(|host| !host.is_empty())?;
    // Only a port may follow the host.
    match authority.strip_prefix(host)? {
        "" => {}
        port => port
            .strip_prefix(':')?
            .parse::<u16>()
            .ok()
            .filter(|port| *port > 0)
            .map(drop)?,
    }
    let userinfo = userinfo.map(|userinfo| match userinfo.split_once(':') {
        Some((user, password)) => format!("{}:{}@", escaped(user), escaped(password)),
        None => format!("{}@", escaped(userinfo)),
    });
    Some(format!(
        "{scheme}://{}{authority}",
        userinfo.unwrap_or_default()
    ))
}

/// Escapes a user name or password. Valid escapes stay as they are.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    let mut parts = text.split('%');
    escaped.extend(
        parts
            .next()
            .map(|part| utf8_percent_encode(part, USERINFO).to_string()),
    );
    for part in parts {
        let is_escape = part.len() >= 2 && part.as_bytes()[..2].iter().all(u8::is_ascii_hexdigit);
        escaped.push_str(if is_escape { "%" } else { "%25" });
        escaped.extend(utf8_percent_encode(part, USERINFO));
    }
    escaped
}

fn switch(name: &str, value: &str) -> Result<bool, InvalidSetting> {
    match value.trim().to_ascii_lowercase().as_str() {
        "" | "false" => Ok(false),
        "true" => Ok(true),
        _ => Err(InvalidSetting(format!(
            "the environment variable {name} is neither true nor false; set it to one of them"
        ))),
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let address: Result<IpAddr, _> = host.trim_matches(['[', ']']).parse();
    host == "localhost"
        || host.ends_with(".localhost")
        || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests;
