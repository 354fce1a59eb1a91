//! `NO_PROXY`, as Go's HTTP client and curl read it. Where they differ, a host is exempt if one of
//! the two exempts it.
//!
//! hyper-util's matcher follows curl: it matches names, parents of names, addresses and networks.
//! This module adds what the matcher lacks. From Go: `*.example.org`, ports and brackets. From
//! curl: blanks between entries and trailing dots. Also `*` for addresses.

use std::net::IpAddr;

use hyper::Uri;
use hyper_util::client::proxy::matcher::Matcher;

/// Returns true if the list exempts this host and port.
pub(super) fn names(list: &str, host: &str, port: u16) -> bool {
    let host = host
        .trim_matches(['[', ']'])
        .trim_end_matches('.')
        .to_ascii_lowercase();
    if list.split(is_separator).any(|entry| entry == "*") {
        return true;
    }
    let entries: Vec<String> = list
        .split(is_separator)
        .filter_map(|entry| entry_for(entry, &host, port))
        .collect();
    let authority = match host.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        Ok(address) => address.to_string(),
        Err(_) => host,
    };
    // The matcher needs a proxy to decide on.
    let matcher = Matcher::builder()
        .all("http://proxy")
        .no(entries.join(","))
        .build();
    format!("http://{authority}/")
        .parse::<Uri>()
        .is_ok_and(|uri| matcher.intercept(&uri).is_none())
}

fn is_separator(c: char) -> bool {
    c == ',' || c.is_whitespace()
}

/// Converts an entry to the matcher's form. Returns `None` if it cannot match this host and port.
fn entry_for(entry: &str, host: &str, port: u16) -> Option<String> {
    let (name, own_port) = split_port(entry);
    if own_port.is_some_and(|own| own != port) {
        return None;
    }
    // `*.example.org` does not match example.org itself, but the matcher takes `.example.org` for
    // both.
    let (below, name) = name
        .strip_prefix("*.")
        .map_or((false, name), |parent| (true, parent));
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    match below {
        _ if name.is_empty() => None,
        true => (name != host).then(|| format!(".{name}")),
        false => Some(name),
    }
}

/// Splits `name`, `name:port`, `10.0.0.0/8`, `::1`, `[::1]` or `[::1]:port`, and removes the
/// brackets.
fn split_port(entry: &str) -> (&str, Option<u16>) {
    if let Some((address, rest)) = entry
        .strip_prefix('[')
        .and_then(|entry| entry.split_once(']'))
    {
        return match rest.strip_prefix(':').map(str::parse) {
            Some(Ok(port)) => (address, Some(port)),
            None if rest.is_empty() => (address, None),
            _ => (entry, None),
        };
    }
    match entry.split_once(':') {
        Some((name, port)) if port.bytes().all(|c| c.is_ascii_digit()) => (name, port.parse().ok()),
        _ => (entry, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last column is the behaviour of golang.org/x/net/http/httpproxy 0.50.0 and curl 7.88.1.
    #[test]
    fn entry_is_read_as_go_and_curl_read_it() {
        const BOTH: [bool; 2] = [true; 2];
        const NEITHER: [bool; 2] = [false; 2];
        const GO: [bool; 2] = [true, false];
        const CURL: [bool; 2] = [false, true];
        // (NO_PROXY, host and port, which of Go and curl exempts them)
        let table = [
            ("corp.internal", "corp.internal:443", BOTH),
            ("corp.internal", "sts.corp.internal:443", BOTH),
            ("corp.internal", "xcorp.internal:443", NEITHER),
            ("CORP.Internal", "sts.corp.internal:443", BOTH),
            ("corp.internal", "STS.CORP.INTERNAL:443", BOTH),
            (".corp.internal", "corp.internal:443", CURL),
            (".corp.internal", "sts.corp.internal:443", BOTH),
            (".corp.internal", "xcorp.internal:443", NEITHER),
            ("*.corp.internal", "corp.internal:443", NEITHER),
            ("*.corp.internal", "sts.corp.internal:443", GO),
            ("*.corp.internal", "a.sts.corp.internal:443", GO),
            ("*.corp.internal", "xcorp.internal:443", NEITHER),
            ("*", "sts.corp.internal:443", BOTH),
            ("*", "10.1.2.3:443", BOTH),
            ("other, corp.internal ", "sts.corp.internal:443", BOTH),
            ("other corp.internal", "sts.corp.internal:443", CURL),
            ("other,,corp.internal,", "sts.corp.internal:443", BOTH),
            ("corp.internal.", "sts.corp.internal:443", CURL),
            ("corp.internal", "sts.corp.internal.:443", CURL),
            ("corp.internal:443", "sts.corp.internal:443", GO),
            ("corp.internal:443", "sts.corp.internal:8443", NEITHER),
            ("corp.internal:8443", "sts.corp.internal:8443", GO),
            (".corp.internal:8443", "sts.corp.internal:8443", GO),
            ("*.corp.internal:8443", "sts.corp.internal:8443", GO),
            ("10.1.2.3", "10.1.2.3:443", BOTH),
            ("10.1.2.3", "10.1.2.4:443", NEITHER),
            ("10.1.2.3:8443", "10.1.2.3:8443", GO),
            ("10.1.2.3:8443", "10.1.2.3:443", NEITHER),
            ("10.0.0.0/8", "10.1.2.3:443", BOTH),
            ("10.0.0.0/8", "11.1.2.3:443", NEITHER),
            ("10.0.0.0/8", "[::ffff:10.1.2.3]:443", GO),
            ("2001:db8::1", "[2001:db8::1]:443", BOTH),
            ("[2001:db8::1]:8443", "[2001:db8::1]:8443", GO),
            ("[2001:db8::1]:8443", "[2001:db8::1]:443", NEITHER),
            ("2001:DB8:0::1", "[2001:db8::1]:443", GO),
            ("2001:db8::/32", "[2001:db8:5::1]:443", GO),
            ("[2001:db8::]/32", "[2001:db8:5::1]:443", NEITHER),
            ("sts.*", "sts.corp.internal:443", NEITHER),
            ("internal", "sts.corp.internal:443", BOTH),
            ("*.", "sts.corp.internal:443", NEITHER),
            (".", "sts.corp.internal:443", NEITHER),
            ("corp.internal/8", "sts.corp.internal:443", NEITHER),
            ("corp.internal:x", "sts.corp.internal:443", NEITHER),
            ("amazonaws.com", "sts.eu-central-1.amazonaws.com:443", BOTH),
            ("", "sts.corp.internal:443", NEITHER),
        ];
        for (list, to, exempt_by) in table {
            let (host, port) = to.rsplit_once(':').unwrap();
            assert_eq!(
                names(list, host, port.parse().unwrap()),
                exempt_by.contains(&true),
                "{list:?} and {to}"
            );
        }
        // Go and curl ignore this entry, but it can mean only one thing.
        assert!(names("[2001:db8::1]", "[2001:db8::1]", 443));
    }
}
