//! The verifying STS of `awsvid dev` with one role, for each `spiffe://example.org/w/<name>` of one
//! issuer.

use std::net::SocketAddr;
use std::time::Duration;

use awsvid::clock::Clock;
use awsvid::dev::sts::{DevAccount, DevProvider, DevSts, TrustedRole};
use awsvid::identity::{RoleArn, SpiffeIdPattern};
use tokio::runtime::Runtime;

use super::env::id;

/// The audience that a token must have.
pub(crate) const AUDIENCE: &str = "awsvid-test";
const ROLE: &str = "arn:aws:iam::123456789012:role/app";

/// The STS, which runs until this is dropped.
pub(crate) struct OneRoleSts {
    sts: DevSts,
    _runtime: Runtime,
}

impl OneRoleSts {
    /// Starts an STS that trusts the tokens of this issuer.
    pub(crate) fn start(issuer: &str) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let account = DevAccount {
            region: "us-east-1".to_owned(),
            providers: vec![DevProvider {
                issuer: issuer.to_owned(),
                client_ids: vec![AUDIENCE.to_owned()],
            }],
            trust_anchors: Vec::new(),
            roles: vec![TrustedRole {
                arn: RoleArn::parse(ROLE).expect("an ARN"),
                issuer: issuer.to_owned(),
                audience: AUDIENCE.to_owned(),
                subjects: vec![SpiffeIdPattern::parse(&id("*")).expect("a pattern")],
                max_duration: Duration::from_secs(12 * 3600),
            }],
            chained: Vec::new(),
        };
        let sts = runtime
            .block_on(DevSts::start(account, Clock::system()))
            .expect("an STS");
        Self {
            sts,
            _runtime: runtime,
        }
    }

    /// Returns the tables `[sts]` and `[[role]]`.
    pub(crate) fn configuration(&self) -> String {
        format!(
            "[sts]\nregion = \"us-east-1\"\nendpoint = \"{}\"\n\
             [[role]]\nname = \"app\"\nspiffe_id = \"{}\"\nrole_arn = \"{ROLE}\"\n",
            self.sts.url(),
            id("*"),
        )
    }

    /// Returns the address at which it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        let url = self.sts.url();
        let address = url.trim_start_matches("http://").trim_end_matches('/');
        address.parse().expect("an address in its URL")
    }

    /// Returns the URL at which it listens.
    pub(crate) fn url(&self) -> &str {
        self.sts.url()
    }

    /// Returns the number of exchanged tokens.
    pub(crate) fn exchanged(&self) -> u64 {
        self.sts.issued()
    }
}
