//! Callers in a pod's own network namespace.

use std::fmt;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::attest::Needs;
use crate::attest::tcp::TcpAttestor;
use crate::caller::{Caller, Refusal, Stranger};
use crate::cgroup::PodUid;

/// Attests the peers of a listener in one pod's network namespace.
///
/// Nothing but a caller's cgroup says whose the namespace is. The first pod that is seen there is taken for its owner; another's
/// process must have been brought there by somebody who may enter namespaces, and gets nothing.
pub struct PodAttestor {
    tcp: TcpAttestor,
    needs: Needs,
    owner: OnceLock<PodUid>,
    /// Whether another pod's process was seen there, and told of.
    intruded: AtomicBool,
}

impl fmt::Debug for PodAttestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodAttestor").field("tcp", &self.tcp).field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl PodAttestor {
    pub(crate) fn new(tcp: TcpAttestor, needs: Needs) -> Self {
        Self { tcp, needs, owner: OnceLock::new(), intruded: AtomicBool::new(false) }
    }

    /// The pod whose namespace it is, once one of its processes has asked.
    pub fn owner(&self) -> Option<&PodUid> {
        self.owner.get()
    }

    /// As [`super::Attestor::tcp`], of callers in the namespace.
    pub async fn tcp(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        admit: impl FnOnce(&Caller) -> bool,
    ) -> Result<Caller, Refusal> {
        let belongs = |caller: &Caller| self.belongs(caller);
        self.tcp.attest((client, server), admit, belongs, |caller| (self.needs)(caller)).await
    }

    /// Lets the network namespace go, which would otherwise live as long as anybody remembers one of its callers. They are
    /// gone from then on.
    pub fn close(&self) {
        self.tcp.close();
    }

    fn belongs(&self, caller: &Caller) -> Result<(), Refusal> {
        let stranger = || Box::new(Stranger::of(caller));
        let Some(pod) = &caller.pod else { return Err(Refusal::NotAPod(stranger())) };
        let owner = self.owner.get_or_init(|| pod.uid.clone());
        if *owner == pod.uid {
            return Ok(());
        }
        // The audit has each.
        if !self.intruded.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                pod = %pod.uid, %owner, namespace = caller.namespace,
                "a process of a pod is in the network namespace of another one, and is refused there"
            );
        }
        Err(Refusal::OtherPod(stranger()))
    }
}
