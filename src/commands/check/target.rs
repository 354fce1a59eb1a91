//! The workload that check names to an agent.

use std::fmt;
use std::path::Path;

use crate::attest;
use crate::cgroup::{PodRoots, PodUid};
use crate::config::Config;
use crate::svid::agent::{AgentSvid, AttestingAgent};
use crate::svid::{ReceivedX509Svid, SourceError};

/// The process or pod that an agent attests for the check.
#[derive(Debug, Clone)]
pub(super) enum CheckTarget {
    /// This process, instead of awsvid.
    Itself,
    Process(u32),
    Pod(PodUid),
    /// The process that stands for a pod at an agent that attests processes.
    ProcessOfPod(u32, PodUid),
}

impl CheckTarget {
    /// Returns whether it is a workload that an operator named.
    pub(super) fn is_workload(&self) -> bool {
        !matches!(self, Self::Itself)
    }

    /// Fetches the JWT-SVIDs that the agent has for it.
    pub(super) async fn fetch(
        &self,
        agent: &dyn AttestingAgent,
        audience: &str,
    ) -> Result<Vec<AgentSvid>, SourceError> {
        match self.by_reference() {
            Ok(uid) => agent.fetch_for_pod(uid, audience).await,
            Err(pid) => agent.fetch_for_pid(pid, audience).await,
        }
    }

    /// Fetches the X.509-SVIDs that the agent has for it.
    pub(super) async fn fetch_x509(
        &self,
        agent: &dyn AttestingAgent,
    ) -> Result<Vec<ReceivedX509Svid>, SourceError> {
        match self.by_reference() {
            Ok(uid) => agent.fetch_x509_for_pod(uid).await,
            Err(pid) => agent.fetch_x509_for_pid(pid).await,
        }
    }

    /// Returns the pod for an agent that accepts references to pods, or else the process.
    fn by_reference(&self) -> Result<&PodUid, u32> {
        match self {
            Self::Itself => Err(std::process::id()),
            Self::Process(pid) | Self::ProcessOfPod(pid, _) => Err(*pid),
            Self::Pod(uid) => Ok(uid),
        }
    }

    /// Returns the target that this agent can attest: the same one, or a process of the pod. `None`
    /// if no process of the pod is visible.
    pub(super) fn for_agent(self, agent: &dyn AttestingAgent, config: &Config) -> Option<Self> {
        match self {
            Self::Pod(uid) if !agent.supports_pod_references() => {
                let root = config.pods.cgroup_root.clone();
                let roots = root.map_or_else(PodRoots::defaults, PodRoots::at);
                let pid = attest::find_process_of_pod(Path::new("/proc"), roots, &uid)?;
                Some(Self::ProcessOfPod(pid, uid))
            }
            other => Some(other),
        }
    }
}

impl fmt::Display for CheckTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Itself => f.write_str("this process"),
            Self::Process(pid) => write!(f, "process {pid}"),
            Self::Pod(uid) => write!(f, "pod {uid}"),
            Self::ProcessOfPod(pid, uid) => write!(f, "pod {uid}, by its process {pid},"),
        }
    }
}
