//! The verifying server with one trust anchor, for each `spiffe://example.org/w/<name>`.

use std::time::Duration;

use awsvid::clock::Clock;
use awsvid::dev::sts::{
    CertifiedRole, ChainedTrust, DevAccount, DevProvider, DevSts, DevTrustAnchor, TrustedRole,
};
use awsvid::identity::{RoleArn, SpiffeIdPattern};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::runtime::Runtime;

use crate::harness::env::id;
use crate::harness::sts::AUDIENCE;

pub(super) const ROLE: &str = "arn:aws:iam::123456789012:role/app";
pub(super) const ANCHOR: &str = "arn:aws:rolesanywhere:us-east-1:123456789012:trust-anchor/9f084b8b-2e5c-4d5c-a4c1-0123456789ab";
pub(super) const PROFILE: &str =
    "arn:aws:rolesanywhere:us-east-1:123456789012:profile/1b2c3d4e-0000-4d5c-a4c1-0123456789ab";

/// CAs, tokens and settings that the server trusts.
pub(crate) struct Trust<'a> {
    /// CAs of the trust anchor, in PEM.
    pub(super) bundle: &'a str,
    pub(super) accepts_session_name: bool,
    /// Region that requests have to be signed for.
    pub(super) region: &'a str,
    pub(super) clock: Clock,
    /// Issuer of tokens for [`ROLE`], and the subjects that may assume it with a token.
    pub(super) tokens: Option<(&'a str, Vec<String>)>,
    /// Roles that sessions of [`ROLE`] may assume, and those after them.
    pub(super) chained: Vec<ChainedTrust>,
}

impl<'a> Trust<'a> {
    pub(crate) fn of(bundle: &'a str) -> Self {
        Self {
            bundle,
            accepts_session_name: true,
            region: "us-east-1",
            clock: Clock::system(),
            tokens: None,
            chained: Vec::new(),
        }
    }
}

/// The server, which runs until this is dropped.
pub(crate) struct VerifyingServer {
    pub(crate) sts: DevSts,
    _runtime: Runtime,
}

fn pattern(text: &str) -> SpiffeIdPattern {
    SpiffeIdPattern::parse(text).unwrap()
}

impl VerifyingServer {
    pub(crate) fn start(trust: Trust<'_>) -> Self {
        let runtime = Runtime::new().unwrap();
        let certificates = CertificateDer::pem_slice_iter(trust.bundle.as_bytes());
        let role = RoleArn::parse(ROLE).unwrap();
        let max_duration = Duration::from_secs(12 * 3600);
        let (providers, roles) = match trust.tokens {
            None => Default::default(),
            Some((issuer, subjects)) => (
                vec![DevProvider {
                    issuer: issuer.to_owned(),
                    client_ids: vec![AUDIENCE.to_owned()],
                }],
                vec![TrustedRole {
                    arn: role.clone(),
                    issuer: issuer.to_owned(),
                    audience: AUDIENCE.to_owned(),
                    subjects: subjects.iter().map(|subject| pattern(subject)).collect(),
                    max_duration,
                }],
            ),
        };
        let account = DevAccount {
            region: trust.region.to_owned(),
            providers,
            roles,
            chained: trust.chained,
            trust_anchors: vec![DevTrustAnchor {
                arn: ANCHOR.to_owned(),
                profile_arn: PROFILE.to_owned(),
                certificates: certificates.map(Result::unwrap).collect(),
                accepts_session_name: trust.accepts_session_name,
                roles: vec![CertifiedRole {
                    arn: role,
                    subjects: vec![pattern(&id("*"))],
                    max_duration,
                }],
            }],
        };
        let sts = runtime
            .block_on(DevSts::start(account, trust.clock))
            .unwrap();
        Self {
            sts,
            _runtime: runtime,
        }
    }

    /// Returns the tables `[roles_anywhere]` and `[[role]]`, with these keys of the role.
    pub(crate) fn configuration(&self, role: &str) -> String {
        format!(
            "[roles_anywhere]\ntrust_anchor_arn = \"{ANCHOR}\"\nprofile_arn = \"{PROFILE}\"\nendpoint = \"{}\"\n\
             [[role]]\nname = \"app\"\nspiffe_id = \"{}\"\nrole_arn = \"{ROLE}\"\n{role}\n",
            self.sts.url(),
            id("*"),
        )
    }
}
