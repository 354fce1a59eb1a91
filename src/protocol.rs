//! The protocol by which a request fetches credentials.

/// A protocol of the workloads' listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// The container credential endpoint.
    Container,
    /// EC2's instance metadata service, version 2.
    Imds,
}

impl Protocol {
    /// All protocols of requests for credentials.
    pub const ALL: [Self; 2] = [Self::Container, Self::Imds];

    /// Returns the label in metrics, which is also a field of audit records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Imds => "imds",
        }
    }
}
