//! The fuzz target for URLs of servers and for `--resolve`, with arbitrary text.

use super::{HttpTarget, Resolve};

/// Checks both: each has a host, without the brackets of an IPv6 address.
pub(crate) fn url(text: &str) -> bool {
    let target = HttpTarget::parse(text);
    if let Ok(target) = &target {
        let HttpTarget {
            uri,
            host,
            port,
            secure,
            ..
        } = target;
        assert!(
            !host.is_empty() && !host.contains(['[', ']', '@', '/']),
            "{host}"
        );
        let usual = if *secure { 443 } else { 80 };
        assert_eq!(*port, uri.port_u16().unwrap_or(usual));
    }
    let resolve = text.parse::<Resolve>();
    if let Ok(found) = &resolve {
        let again = format!("{}:{}:{}", found.host, found.port, found.address);
        assert_eq!(again.parse(), Ok(found.clone()));
    }
    target.is_ok() || resolve.is_ok()
}
