//! The address of a SPIFFE endpoint: the value of `SPIFFE_ENDPOINT_SOCKET`
//! and `[identity] workload_api_socket`.
//!
//! Grammar: SPIFFE_Workload_Endpoint.md, section 4. Other forms are rejected, so a typing error
//! fails at the start and does not connect to another address.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::identity::InvalidName;

/// The longest path: `sun_path` holds 108 bytes, the last of them NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// The address of a SPIFFE endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket, by its absolute path.
    Unix(PathBuf),
    /// A TCP address. The standard allows only IP addresses here.
    Tcp(SocketAddr),
}

impl Endpoint {
    /// Parses `unix:///absolute/path`, `unix:/absolute/path` or `tcp://<IP address>:<port>`, an
    /// IPv6 address in brackets. Fails for any other form.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if let Some(rest) = text.strip_prefix("unix:") {
            return parse_unix(rest);
        }
        if let Some(rest) = text.strip_prefix("tcp://") {
            return parse_tcp(rest);
        }
        let form = "an endpoint begins with unix:// or tcp://";
        Err(InvalidName(form.to_owned()))
    }
}

fn parse_unix(rest: &str) -> Result<Endpoint, InvalidName> {
    let invalid = |text: &str| Err(InvalidName(text.to_owned()));
    let path = match rest.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        Some(_) => {
            return invalid(
                "a unix endpoint has no host; write three slashes, as in unix:///run/spire/agent.sock",
            );
        }
        None => rest,
    };
    if !path.starts_with('/') {
        return invalid(
            "the path of a unix endpoint is absolute, as in unix:///run/spire/agent.sock",
        );
    }
    if path.ends_with('/') {
        return invalid("a unix endpoint names a socket, not a directory");
    }
    // In a URI these would not be part of the path, and implementations read them differently.
    if path.contains(['?', '#', '%']) || path.chars().any(char::is_control) {
        return invalid("the path of a unix endpoint has no `?`, `#`, `%` or control characters");
    }
    if path.len() > SOCKET_PATH_MAX {
        return invalid("the kernel takes socket paths of at most 107 bytes");
    }
    Ok(Endpoint::Unix(PathBuf::from(path)))
}

fn parse_tcp(rest: &str) -> Result<Endpoint, InvalidName> {
    let invalid = |text: &str| Err(InvalidName(text.to_owned()));
    if rest.contains(['/', '?', '#', '@']) {
        return invalid(
            "a tcp endpoint is an address and a port, nothing else, as in tcp://127.0.0.1:8081",
        );
    }
    match rest.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => invalid("port 0 is not a valid port"),
        Ok(address) => Ok(Endpoint::Tcp(address)),
        Err(_) => invalid(
            "a tcp endpoint is an IP address (no name; IPv6 in brackets) and a port, as in tcp://127.0.0.1:8081",
        ),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_accepts_endpoints_of_the_standard() {
        let unix = |path: &str| Endpoint::Unix(PathBuf::from(path));
        let tcp = |address: &str| Endpoint::Tcp(address.parse().unwrap());
        let longest = format!("/{}", "s".repeat(106));
        let table = [
            (
                "unix:///run/spire/agent.sock".to_owned(),
                unix("/run/spire/agent.sock"),
            ),
            (
                "unix:/run/spire/agent.sock".to_owned(),
                unix("/run/spire/agent.sock"),
            ),
            ("unix:///a b.sock".to_owned(), unix("/a b.sock")),
            (format!("unix://{longest}"), unix(&longest)),
            ("tcp://127.0.0.1:8000".to_owned(), tcp("127.0.0.1:8000")),
            ("tcp://[::1]:8000".to_owned(), tcp("[::1]:8000")),
        ];
        for (text, endpoint) in table {
            assert_eq!(Endpoint::parse(&text), Ok(endpoint.clone()), "{text}");
            assert_eq!(
                Endpoint::parse(&endpoint.to_string()),
                Ok(endpoint),
                "{text}: as it is printed"
            );
        }
    }

    #[test]
    fn parse_rejects_other_endpoints_with_a_reason() {
        let too_long = format!("unix:///{}", "s".repeat(107));
        let table = [
            ("", "begins with unix:// or tcp://"),
            ("/run/spire/agent.sock", "begins with unix:// or tcp://"),
            ("http://127.0.0.1:8000", "begins with"),
            ("UNIX:///run/a.sock", "begins with"),
            (" unix:///run/a.sock", "begins with"),
            ("unix:", "is absolute"),
            ("unix://", "has no host"),
            ("unix:tmp/a.sock", "is absolute"),
            ("unix:@abstract", "is absolute"),
            ("unix://run/a.sock", "has no host"),
            ("unix://localhost/run/a.sock", "has no host"),
            ("unix:///", "not a directory"),
            ("unix:///run/", "not a directory"),
            ("unix:///run/a.sock?x=1", "has no `?`"),
            ("unix:///run/a.sock#x", "has no `?`"),
            ("unix:///run/a%20b.sock", "has no `?`"),
            ("unix:///run/a\n.sock", "control characters"),
            ("unix:///run/a\0.sock", "control characters"),
            (too_long.as_str(), "107 bytes"),
            ("tcp:127.0.0.1:8000", "begins with"),
            ("tcp://", "an IP address"),
            ("tcp://127.0.0.1", "an IP address"),
            ("tcp://localhost:8000", "no name"),
            ("tcp://agent.example.org:8000", "no name"),
            ("tcp://::1:8000", "IPv6 in brackets"),
            ("tcp://127.0.0.1:0", "port 0"),
            ("tcp://127.0.0.1:65536", "a port"),
            ("tcp://127.0.0.1:8000/", "nothing else"),
            ("tcp://127.0.0.1:8000/foo", "nothing else"),
            ("tcp://user@127.0.0.1:8000", "nothing else"),
            ("tcp://127.0.0.1:8000?a=b", "nothing else"),
        ];
        for (text, reason) in table {
            let error = Endpoint::parse(text).unwrap_err();
            assert!(error.0.contains(reason), "{text}: {error}");
        }
    }
}
