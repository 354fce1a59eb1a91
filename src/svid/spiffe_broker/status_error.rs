//! Errors with a fix, from the statuses that an agent answers.

use tonic::{Code, Status};

use super::{BrokerApi, WorkloadRef};
use crate::socket_endpoint::Endpoint;
use crate::svid::channel::is_broken;
use crate::svid::{SourceError, one_line};

impl BrokerApi {
    /// Converts the agent's rejection to an error with a fix. The texts are those of SPIRE 1.15.
    pub(super) fn error_of(&self, workload: WorkloadRef<'_>, status: &Status) -> SourceError {
        let (text, reply, endpoint) =
            (status.message(), one_line(status.message()), &self.endpoint);
        if is_broken(status) {
            return no_answer(endpoint, &reply);
        }
        // The agent includes these texts in the errors of all its attestors, with varying codes.
        if text.contains("broker configuration missing")
            || (text.contains("broker \"") && text.contains("not configured"))
        {
            return SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} does not attest pods for awsvid: its plugin WorkloadAttestor \"k8s\" needs \
                 a block `experimental {{ broker {{ ... }} }}` of its own, with awsvid's SPIFFE ID in `brokers` ({reply})"
            ));
        }
        match status.code() {
            Code::PermissionDenied | Code::NotFound => self.denial(workload, status),
            Code::FailedPrecondition if text.contains("kubelet client") => {
                SourceError::Misconfigured(format!(
                    "the SPIFFE agent at {endpoint} cannot search for pods: let its plugin WorkloadAttestor \"k8s\" query the kubelet, \
                 or give awsvid `pod_reference_scope = \"cluster\"` there ({reply})"
                ))
            }
            Code::InvalidArgument => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} finds the request invalid: check whether its SPIRE is newer than this awsvid ({reply})"
            )),
            Code::Unimplemented if text.contains("workload attestor") => {
                let (plural, _, plugin) = workload.kind();
                SourceError::Misconfigured(format!(
                    "the SPIFFE agent at {endpoint} has no plugin that attests {plural}, as WorkloadAttestor \"{plugin}\" does ({reply})"
                ))
            }
            Code::Unimplemented => SourceError::Misconfigured(format!(
                "the server at {endpoint} has no SPIFFE Broker API: write the `socket_path` of the agent's `experimental \
                 {{ broker {{ ... }} }}` block as `broker_socket` in [identity] ({reply})"
            )),
            Code::OutOfRange => SourceError::Misconfigured(format!(
                "the SPIFFE agent at {endpoint} sent more than the tokens of one workload: check the socket's path ({reply})"
            )),
            _ => no_answer(endpoint, &reply),
        }
    }

    /// Returns the error for `PERMISSION_DENIED` and `NOT_FOUND`, which concern one workload or one
    /// kind of workloads.
    fn denial(&self, workload: WorkloadRef<'_>, status: &Status) -> SourceError {
        let (text, reply, endpoint) =
            (status.message(), one_line(status.message()), &self.endpoint);
        match status.code() {
            Code::PermissionDenied if text.contains("reference type") => {
                let (plural, type_url, _) = workload.kind();
                SourceError::Misconfigured(format!(
                    "the SPIFFE agent at {endpoint} does not let awsvid name {plural}: add {{ type_url = \"{type_url}\" }} to \
                     awsvid's `allowed_reference_types` in the agent's `experimental {{ broker {{ ... }} }}` block ({reply})"
                ))
            }
            Code::PermissionDenied if text.contains("impersonate-via-spire") => {
                SourceError::Denied(format!(
                    "Kubernetes does not let awsvid request SVIDs of {}: give the user that is named like awsvid's SPIFFE ID the verb \
                 impersonate-via-spire on pods ({reply})",
                    workload.name()
                ))
            }
            Code::NotFound if matches!(workload, WorkloadRef::Pod(_)) => {
                SourceError::Denied(format!(
                    "the SPIFFE agent at {endpoint} does not find {} on this node: check the configuration of its plugin \
                 WorkloadAttestor \"k8s\", which queries the kubelet ({reply})",
                    workload.name()
                ))
            }
            _ => SourceError::Denied(format!(
                "no registration entry of the SPIFFE agent at {endpoint} matches {} ({reply})",
                workload.name()
            )),
        }
    }
}

fn no_answer(endpoint: &Endpoint, reply: &str) -> SourceError {
    SourceError::Unavailable(format!(
        "the SPIFFE agent at {endpoint} gave no answer: {reply}"
    ))
}
