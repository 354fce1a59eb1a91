//! Messages, clients and servers, generated from the definitions in `proto/`.
//!
//! `Debug` of messages with keys or tokens shows only the SPIFFE ID.

use std::fmt;

/// The SPIFFE Workload API.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used
)]
pub mod workload {
    tonic::include_proto!("_");
}

/// The SPIFFE Broker API.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used
)]
pub mod broker {
    tonic::include_proto!("spiffe.broker");
}

/// SPIRE's own APIs, in the nesting of their packages, by which the generated code finds its parts.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used
)]
pub mod spire {
    /// Messages of `spire.api` (SPIRE).
    pub mod api {
        /// Messages of `spire.api.types` (SPIRE).
        pub mod types {
            tonic::include_proto!("spire.api.types");
        }
        /// Messages of `spire.api.agent` (SPIRE).
        pub mod agent {
            /// Messages of `spire.api.agent.delegatedidentity` (SPIRE).
            pub mod delegatedidentity {
                /// SPIRE's Delegated Identity API, version 1.
                pub mod v1 {
                    tonic::include_proto!("spire.api.agent.delegatedidentity.v1");
                }
            }
        }
    }
}

impl spire::api::types::Spiffeid {
    /// Returns the ID as a text, which may not be a valid SPIFFE ID.
    pub fn text(&self) -> String {
        format!("spiffe://{}{}", self.trust_domain, self.path)
    }
}

impl fmt::Debug for workload::Jwtsvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JWTSVID")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for workload::X509svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509SVID")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for broker::Jwtsvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JWTSVID")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for broker::X509svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509SVID")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for spire::api::agent::delegatedidentity::v1::X509svidWithKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.x509_svid.as_ref().and_then(|svid| svid.id.as_ref());
        f.debug_struct("X509SVIDWithKey")
            .field("id", &id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for spire::api::types::Jwtsvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JWTSVID")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
