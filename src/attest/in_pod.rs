//! Callers in a pod's own network namespace.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::attest::Needs;
use crate::attest::pods::Housed;
use crate::attest::tcp::TcpAttestor;
use crate::caller::{Caller, Refusal, Stranger};
use crate::cgroup::PodUid;

/// Attests the peers of a listener in one pod's network namespace.
///
/// Nothing but a caller's cgroup says whose the namespace is. The first pod that is seen there is taken for its owner, as long as
/// that pod lives; another's process must have been brought there by somebody who may enter namespaces, and gets nothing.
pub struct PodAttestor {
    tcp: TcpAttestor,
    needs: Needs,
    owner: Mutex<Option<Tenant>>,
}

struct Tenant {
    pod: Housed,
    /// Whether another pod's process was seen there, and told of.
    intruded: bool,
}

impl fmt::Debug for PodAttestor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodAttestor").field("tcp", &self.tcp).field("owner", &self.owner()).finish_non_exhaustive()
    }
}

impl PodAttestor {
    pub(crate) fn new(tcp: TcpAttestor, needs: Needs) -> Self {
        Self { tcp, needs, owner: Mutex::default() }
    }

    /// The pod whose namespace it is, once one of its processes has asked.
    pub fn owner(&self) -> Option<PodUid> {
        self.locked().as_ref().map(|owner| owner.pod.pod.uid.clone())
    }

    /// As [`super::Attestor::tcp`], of callers in the namespace.
    pub async fn tcp(
        &self,
        client: SocketAddr,
        server: SocketAddr,
        admit: impl FnOnce(&Caller) -> bool,
    ) -> Result<Caller, Refusal> {
        let belongs = |caller: &Caller, pod: Option<&Housed>| self.belongs(caller, pod);
        self.tcp.attest((client, server), admit, belongs, |caller| (self.needs)(caller)).await
    }

    /// Lets the network namespace go, which would otherwise live as long as anybody remembers one of its callers. They are
    /// gone from then on.
    pub fn close(&self) {
        self.tcp.close();
    }

    fn belongs(&self, caller: &Caller, pod: Option<&Housed>) -> Result<(), Refusal> {
        let stranger = || Box::new(Stranger::of(caller));
        let Some(pod) = pod else { return Err(Refusal::NotAPod(stranger())) };
        let mut owner = self.locked();
        let owner = match &mut *owner {
            Some(owner) if owner.pod.is_same(pod) => return Ok(()),
            // Its directory was made anew, or it is another pod, and the one before has no process any more.
            Some(owner) if owner.pod.pod.uid != pod.pod.uid && !owner.pod.is_gone() => owner,
            owner => {
                if let Some(before) = owner.as_ref().filter(|before| before.pod.pod.uid != pod.pod.uid) {
                    // Whoever may enter namespaces could have waited for that.
                    tracing::info!(
                        pod = %pod.pod.uid, before = %before.pod.pod.uid, namespace = caller.namespace,
                        "a network namespace whose pod is gone has another pod now"
                    );
                }
                *owner = Some(Tenant { pod: pod.clone(), intruded: false });
                return Ok(());
            }
        };
        // The audit has each.
        if !std::mem::replace(&mut owner.intruded, true) {
            tracing::warn!(
                pod = %pod.pod.uid, owner = %owner.pod.pod.uid, namespace = caller.namespace,
                "a process of a pod is in the network namespace of another one, and is refused there"
            );
        }
        Err(Refusal::OtherPod(stranger()))
    }

    fn locked(&self) -> MutexGuard<'_, Option<Tenant>> {
        self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
