//! An STS on loopback with real verification. It has only `AssumeRoleWithWebIdentity`, `AssumeRole`
//! and `GetCallerIdentity`, and `CreateSession` of IAM Roles Anywhere.
//!
//! Wire format: AWS Security Token Service API Reference, version 2011-06-15 (the query protocol).

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, Request};

use super::keys::random_bytes;
use super::loopback_http::{self, LoopbackResponse, Server};
use crate::clock::Clock;
use crate::identity::{RoleArn, SessionName, SpiffeId, SpiffeIdPattern};
use crate::roles_anywhere::signature::SESSIONS_PATH;

mod answer;
mod chained;
mod create_session;
mod rejection;
mod request;
mod sessions;
mod sigv4;
mod token;

pub use chained::ChainedTrust;

use answer::DevCaller;
pub use create_session::{CertifiedRole, DevTrustAnchor};
use rejection::{Code, DevRejection};
use request::{Parameters, WebIdentityRequest};
use sessions::{SessionFacts, Sessions, random_id};

/// Maximum number of canonical requests that are kept.
const MAX_ACCEPTED_REQUESTS: usize = 16;
const VERSION: &str = "2011-06-15";

/// The IAM resources of an account.
#[derive(Debug, Clone)]
pub struct DevAccount {
    /// Region that requests are signed for.
    pub region: String,
    /// OpenID Connect providers of the account.
    pub providers: Vec<DevProvider>,
    /// Roles that tokens may assume.
    pub roles: Vec<TrustedRole>,
    /// Trust anchors of IAM Roles Anywhere.
    pub trust_anchors: Vec<DevTrustAnchor>,
    /// Roles that sessions of other roles may assume.
    pub chained: Vec<ChainedTrust>,
}

/// An OpenID Connect provider.
#[derive(Debug, Clone)]
pub struct DevProvider {
    /// URL, exactly as in `iss`: http, a loopback address, no slash at the end.
    pub issuer: String,
    /// Audiences that the provider accepts.
    pub client_ids: Vec<String>,
}

/// A role and its trust policy.
#[expect(missing_docs, reason = "the names of the fields describe them")]
#[derive(Debug, Clone)]
pub struct TrustedRole {
    pub arn: RoleArn,
    /// URL of the provider with tokens that may assume the role.
    pub issuer: String,
    /// The condition on `aud`.
    pub audience: String,
    /// The condition on `sub`: one of these patterns.
    pub subjects: Vec<SpiffeIdPattern>,
    /// `MaxSessionDuration`: 1 to 12 hours.
    pub max_duration: Duration,
}

/// The running STS. It and its credentials end when this value is dropped.
#[derive(Debug)]
pub struct DevSts {
    url: String,
    state: Arc<StsState>,
    _server: Server,
}

impl DevSts {
    /// Serves `account` on a port of 127.0.0.1 that the kernel picks.
    pub async fn start(account: DevAccount, clock: Clock) -> io::Result<Self> {
        let (listener, address) = loopback_http::bind().await?;
        let role_id = random_id("AROA").map_err(io::Error::other)?;
        let state = StsState {
            account,
            role_id,
            clock,
            sessions: Sessions::default(),
            issued: AtomicU64::new(0),
            accepted: Mutex::default(),
        };
        let state = Arc::new(state);
        let server = Server::start(listener, {
            let state = state.clone();
            move |request| {
                let state = state.clone();
                async move { state.answer(request).await }
            }
        });
        Ok(Self {
            url: format!("http://{address}"),
            state,
            _server: server,
        })
    }

    /// Returns the endpoint, for `[sts] endpoint` and `AWS_ENDPOINT_URL_STS`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the canonical requests of the latest sessions of IAM Roles Anywhere, the newest
    /// last.
    pub fn accepted_requests(&self) -> Vec<String> {
        self.state.accepted().iter().cloned().collect()
    }

    /// Returns the ARN of the session with these credentials, as `GetCallerIdentity` has it.
    pub fn session_arn(&self, access_key_id: &str) -> Option<String> {
        let session = self.state.sessions.find(access_key_id)?;
        Some(session.caller.arn)
    }

    /// Returns the number of issued sessions, which is the number of successful exchanges.
    pub fn issued(&self) -> u64 {
        self.state.issued.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct StsState {
    account: DevAccount,
    /// Id of the role in session ids, as `AROA...` at AWS.
    role_id: String,
    clock: Clock,
    sessions: Sessions,
    issued: AtomicU64,
    /// The latest canonical requests with which IAM Roles Anywhere created sessions.
    accepted: Mutex<VecDeque<String>>,
}

impl StsState {
    async fn answer(&self, request: Request<Bytes>) -> LoopbackResponse {
        if request.method() == Method::POST && request.uri().path() == SESSIONS_PATH {
            return self.create_session(&request);
        }
        let request_id = random_bytes::<16>().map(uuid).unwrap_or_default();
        let parameters = Parameters::of(&request);
        let action = parameters.get("Action").unwrap_or("(none)");
        let version = parameters.get("Version").unwrap_or("NO_VERSION_SPECIFIED");
        let answered = match (action, version) {
            ("AssumeRoleWithWebIdentity", VERSION) => {
                self.assume_role(&parameters, &request_id).await
            }
            ("AssumeRole", VERSION) => self.assume_chained(&request, &parameters, &request_id),
            ("GetCallerIdentity", VERSION) => {
                self.caller_identity(&request, &parameters, &request_id)
            }
            _ => {
                let message =
                    format!("Could not find operation {action:.64} for version {version:.64}");
                Err(DevRejection::new(Code::InvalidAction, message))
            }
        };
        answered.unwrap_or_else(|rejection| answer::rejected(&rejection, &request_id))
    }

    async fn assume_role(
        &self,
        parameters: &Parameters,
        request_id: &str,
    ) -> Result<LoopbackResponse, DevRejection> {
        let request = WebIdentityRequest::of(parameters)?;
        let now = self.clock.now();
        let claims = token::verify(request.token, &self.account, now).await?;
        // A missing role and one that does not trust the token get the same error.
        let role = self
            .account
            .roles
            .iter()
            .find(|role| role.arn == request.role_arn);
        let Some(role) = role.filter(|role| role.trusts(&claims)) else {
            return Err(DevRejection::new(
                Code::AccessDenied,
                "Not authorized to perform sts:AssumeRoleWithWebIdentity",
            ));
        };
        if request.duration > role.max_duration {
            let message =
                "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
            return Err(DevRejection::new(Code::ValidationError, message));
        }
        let caller = self.caller(&role.arn, &request.session_name);
        let session = self
            .sessions
            .issue(caller, SessionFacts::of(&role.arn), now, request.duration)
            .map_err(|error| DevRejection::internal(&error))?;
        self.count_issued();
        Ok(answer::assumed(
            &session.credentials,
            &session.caller,
            &claims,
            request_id,
        ))
    }

    fn count_issued(&self) {
        self.issued.fetch_add(1, Ordering::Relaxed);
    }

    fn caller_identity(
        &self,
        request: &Request<Bytes>,
        parameters: &Parameters,
        request_id: &str,
    ) -> Result<LoopbackResponse, DevRejection> {
        let now = self.clock.now();
        let session = sigv4::authenticate(
            request,
            parameters,
            &self.sessions,
            &self.account.region,
            now,
        )?;
        Ok(answer::identity(&session.caller, request_id))
    }

    /// Records a session of IAM Roles Anywhere.
    fn record_accepted(&self, canonical_request: String) {
        self.count_issued();
        let mut accepted = self.accepted();
        accepted.push_back(canonical_request);
        if accepted.len() > MAX_ACCEPTED_REQUESTS {
            accepted.pop_front();
        }
    }

    fn accepted(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn caller(&self, role: &RoleArn, session: &SessionName) -> DevCaller {
        let session = session.as_str();
        let account = role.account().unwrap_or_default();
        let partition = role.as_str().split(':').nth(1).unwrap_or_default();
        let name = role.as_str().rsplit('/').next().unwrap_or_default();
        DevCaller {
            arn: format!("arn:{partition}:sts::{account}:assumed-role/{name}/{session}"),
            user_id: format!("{}:{session}", self.role_id),
            account: account.to_owned(),
        }
    }
}

impl TrustedRole {
    fn trusts(&self, claims: &token::DevTokenClaims) -> bool {
        let subject = SpiffeId::parse(&claims.sub);
        self.issuer == claims.issuer
            && self.audience == claims.audience
            && subject.is_ok_and(|subject| {
                self.subjects
                    .iter()
                    .any(|pattern| pattern.matches(&subject))
            })
    }
}

/// Formats a request id in the form of AWS's.
fn uuid(random: [u8; 16]) -> String {
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let [time, middle, version, variant, node] = [
        &random[..4],
        &random[4..6],
        &random[6..8],
        &random[8..10],
        &random[10..],
    ]
    .map(hex);
    format!("{time}-{middle}-{version}-{variant}-{node}")
}

#[cfg(test)]
mod tests;
