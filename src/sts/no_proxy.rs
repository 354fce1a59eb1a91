//! `NO_PROXY`, as Go's HTTP client and curl read it: where one of the two goes directly, so does this.
//!
//! hyper-util's matcher, which follows curl, knows names, parents of names, addresses and networks. What it does not know, and Go
//! does: `*.example.org`, ports, addresses in brackets; what curl does: blanks between entries, a dot at the end; and what both do:
//! `*` is for addresses, too.

use std::net::IpAddr;

use hyper::Uri;
use hyper_util::client::proxy::matcher::Matcher;

/// Whether the list names this host and port.
pub(super) fn names(list: &str, host: &str, port: u16) -> bool {
    let host = host.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase();
    if list.split(is_separator).any(|entry| entry == "*") {
        return true;
    }
    let entries: Vec<String> = list.split(is_separator).filter_map(|entry| entry_for(entry, &host, port)).collect();
    let authority = match host.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        Ok(address) => address.to_string(),
        Err(_) => host,
    };
    // The proxy only stands for any.
    let matcher = Matcher::builder().all("http://proxy").no(entries.join(",")).build();
    format!("http://{authority}/").parse::<Uri>().is_ok_and(|uri| matcher.intercept(&uri).is_none())
}

fn is_separator(c: char) -> bool {
    c == ',' || c.is_whitespace()
}

/// An entry in the matcher's form; `None` where it is not about this host and port.
fn entry_for(entry: &str, host: &str, port: u16) -> Option<String> {
    let (name, own_port) = split_port(entry);
    if own_port.is_some_and(|own| own != port) {
        return None;
    }
    // `*.example.org` is for what is below example.org; with a mere dot before it the matcher, as curl, takes that as well.
    let (below, name) = name.strip_prefix("*.").map_or((false, name), |parent| (true, parent));
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    match below {
        _ if name.is_empty() => None,
        true => (name != host).then(|| format!(".{name}")),
        false => Some(name),
    }
}

/// `name`, `name:port`, `10.0.0.0/8`, `::1`, `[::1]` or `[::1]:port`, without the brackets.
fn split_port(entry: &str) -> (&str, Option<u16>) {
    if let Some((address, rest)) = entry.strip_prefix('[').and_then(|entry| entry.split_once(']')) {
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

    /// What Go's golang.org/x/net/http/httpproxy 0.50.0 and curl 7.88.1 do with each row was tried out.
    #[test]
    fn entry_is_read_as_go_and_curl_read_it() {
        const BOTH: [bool; 2] = [true; 2];
        const NEITHER: [bool; 2] = [false; 2];
        const GO: [bool; 2] = [true, false];
        const CURL: [bool; 2] = [false, true];
        // (NO_PROXY, host and port, who of the two goes directly)
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
        for (list, to, who) in table {
            let (host, port) = to.rsplit_once(':').unwrap();
            assert_eq!(names(list, host, port.parse().unwrap()), who.contains(&true), "{list:?} and {to}");
        }
        // Neither of the two takes this, and nothing else can be meant by it.
        assert!(names("[2001:db8::1]", "[2001:db8::1]", 443));
    }
}
