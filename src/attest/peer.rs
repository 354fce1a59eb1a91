//! The two steps from a socket to a caller: the peer by the facts of its socket, and then its
//! attestation.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::attest::pod_attestor::PodAttestor;
use crate::attest::rejection::Rejection;
use crate::attest::tcp::SocketProof;
use crate::attest::unix::ConnectorProof;
use crate::caller::{
    Caller, CallerFacts, ListenerKind, PeerFacts, PeerProof, Process, ProcessFacts, WorkloadKey,
};

/// A peer by the facts of its socket.
///
/// Over TCP its process is not known yet. On the unix socket the kernel names the process, of which
/// only the ids and the cgroup are read.
#[derive(Debug)]
pub struct Peer {
    listener: ListenerKind,
    facts: PeerFacts,
    evidence: Evidence,
}

/// The facts from the kernel that the attestation continues with.
#[derive(Debug)]
enum Evidence {
    Unix {
        connector: Box<ConnectorProof>,
        process: Process,
        stream: Arc<OwnedFd>,
    },
    Tcp {
        socket: Box<SocketProof>,
        /// The pod's network namespace; `None` for the host's.
        netns: Option<Arc<PodAttestor>>,
    },
}

/// A peer that may be in its network namespace, and whose process is not read yet.
///
/// It is the only way to a [`Caller`].
#[derive(Debug)]
pub struct Attestation {
    peer: Peer,
    /// The facts to read from the process; `None` if it is not read.
    facts_to_read: Option<ProcessFacts>,
}

impl Peer {
    /// Creates the peer of a connection to the unix socket.
    pub(crate) fn unix(facts: PeerFacts, connector: ConnectorProof, stream: Arc<OwnedFd>) -> Self {
        Self {
            listener: ListenerKind::Unix,
            facts,
            evidence: Evidence::Unix {
                process: connector.to_process(),
                connector: Box::new(connector),
                stream,
            },
        }
    }

    /// Creates the peer of a TCP connection, in the network namespace of a pod if there is a
    /// `netns`.
    pub(crate) fn tcp(
        facts: PeerFacts,
        socket: SocketProof,
        netns: Option<Arc<PodAttestor>>,
    ) -> Self {
        let listener = match &netns {
            Some(_) => ListenerKind::Pod,
            None => ListenerKind::Tcp,
        };
        Self {
            listener,
            facts,
            evidence: Evidence::Tcp {
                socket: Box::new(socket),
                netns,
            },
        }
    }

    /// Returns the facts by which rules decide, as far as they are known.
    pub fn facts(&self) -> CallerFacts<'_> {
        CallerFacts {
            listener: self.listener,
            peer: &self.facts,
            process: match &self.evidence {
                Evidence::Unix { process, .. } => Some(process),
                Evidence::Tcp { .. } => None,
            },
        }
    }

    /// Returns the key by which limits count this peer.
    pub fn workload_key(&self) -> WorkloadKey {
        self.facts.workload_key()
    }

    /// Begins the attestation of the peer, for a decision that needs these facts of its process;
    /// `None` if it needs none.
    ///
    /// Claims a pod's network namespace for the peer's pod. Fails if the peer is in no pod, or the
    /// namespace belongs to another one. Does not wait.
    pub fn begin_attestation(
        self,
        facts_needed: Option<ProcessFacts>,
    ) -> Result<Attestation, Rejection> {
        let facts_to_read = match &self.evidence {
            Evidence::Unix { connector, .. } => facts_needed.or_else(|| {
                let needs_process = connector.needs_process();
                needs_process.then(ProcessFacts::default)
            }),
            Evidence::Tcp { socket, netns } => {
                if let Some(netns) = netns {
                    netns
                        .check_owner(socket)
                        .map_err(|error| Rejection::of(error, &self.facts))?;
                }
                facts_needed
            }
        };
        Ok(Attestation {
            peer: self,
            facts_to_read,
        })
    }
}

impl Attestation {
    /// Returns the facts of the peer's socket.
    pub fn peer_facts(&self) -> &PeerFacts {
        &self.peer.facts
    }

    /// Returns whether [`Attestation::finish`] can block on something that the caller controls, or
    /// a later verification of the caller can.
    pub fn may_wait(&self) -> bool {
        match (&self.peer.evidence, self.facts_to_read) {
            (_, None) => false,
            (Evidence::Unix { connector, .. }, Some(facts)) => {
                facts.may_wait() || connector.needs_process()
            }
            (Evidence::Tcp { .. }, Some(_)) => true,
        }
    }

    /// Searches for the peer's process and reads the needed facts from it.
    ///
    /// Fails if no process, or several different ones, hold the socket, and if the search has used
    /// its time.
    pub async fn finish(self) -> Result<Caller, Rejection> {
        let Peer {
            listener,
            facts,
            evidence,
        } = self.peer;
        let attested: Result<(Option<Process>, Box<dyn PeerProof>), _> =
            match (evidence, self.facts_to_read) {
                (
                    Evidence::Unix {
                        connector, process, ..
                    },
                    None,
                ) => Ok((Some(process), connector)),
                (
                    Evidence::Unix {
                        connector, stream, ..
                    },
                    Some(facts),
                ) => match connector.read_facts(stream.as_fd(), facts).await {
                    Ok((process, connector)) => Ok((Some(process), connector)),
                    Err(error) => Err(error),
                },
                (Evidence::Tcp { socket, .. }, None) => Ok((None, socket)),
                (Evidence::Tcp { socket, .. }, Some(needed)) => {
                    match socket.find_process(facts.workload_key(), needed).await {
                        Ok((process, owner)) => Ok((Some(process), owner)),
                        Err(error) => Err(error),
                    }
                }
            };
        match attested {
            Ok((process, proof)) => Ok(Caller {
                listener,
                peer: facts,
                process,
                proof,
            }),
            Err(error) => Err(Rejection {
                error,
                peer: Some(facts),
            }),
        }
    }
}
