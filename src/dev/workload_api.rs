//! The SPIFFE Workload API of `dev`, on a unix socket that only the daemon's own user can reach.
//!
//! Behaviour: SPIFFE_Workload_API.md, sections 4 and 6; SPIFFE_Workload_Endpoint.md, section 4.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::{Uid, geteuid};
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::BoxStream;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::authority::DevAuthority;
use super::keys::SigningKey;
use crate::clock::Clock;
use crate::identity::SpiffeId;
use crate::svid::proto::workload::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use crate::svid::proto::workload::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse, X509svid,
    X509svidRequest, X509svidResponse,
};

/// Lifetime of a JWT-SVID: SPIRE's default.
const SVID_LIFETIME: Duration = Duration::from_secs(300);
/// The header that protects a workload from being tricked into a request, for instance by SSRF.
const SECURITY_HEADER: &str = "workload.spiffe.io";

/// Identities that a Workload API signs, and its key.
#[derive(Debug)]
pub struct Registrations {
    /// Trust domain, for instance `dev.local`.
    pub trust_domain: String,
    /// Identities that the caller is registered for.
    pub spiffe_ids: Vec<SpiffeId>,
    /// Value of `iss` in the tokens.
    pub issuer: String,
    /// Key that signs the tokens.
    pub key: Arc<SigningKey>,
    /// CA that signs the certificates.
    pub authority: Arc<DevAuthority>,
    /// Clock for the tokens' times.
    pub clock: Clock,
}

/// The running Workload API. It ends when this value is dropped.
#[derive(Debug)]
pub struct DevWorkloadApi {
    socket: PathBuf,
    _server: JoinSet<()>,
}

impl DevWorkloadApi {
    /// Creates `directory` (mode 0700; it must not exist) and listens on a socket in it.
    pub fn start(directory: &Path, registrations: Registrations) -> io::Result<Self> {
        Self::start_for(geteuid(), directory, registrations)
    }

    fn start_for(owner: Uid, directory: &Path, registrations: Registrations) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(directory)?;
        let socket = directory.join("agent.sock");
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, Permissions::from_mode(0o600))?;
        let api = SpiffeWorkloadApiServer::with_interceptor(
            DevWorkloadApiService { registrations },
            move |request| admit(request, owner),
        );
        let mut server = JoinSet::new();
        server.spawn(async move {
            let served = Server::builder()
                .add_service(api)
                .serve_with_incoming(UnixListenerStream::new(listener));
            if let Err(error) = served.await {
                tracing::error!(%error, "dev: the Workload API ended");
            }
        });
        Ok(Self {
            socket,
            _server: server,
        })
    }

    /// Returns the socket's address in the form of `[identity] workload_api_socket`: `unix:///...`.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }
}

/// Checks the header that the standard requires, and the caller's uid, before each call.
fn admit(request: Request<()>, owner: Uid) -> Result<Request<()>, Status> {
    let mut values = request.metadata().get_all(SECURITY_HEADER).iter();
    if !matches!((values.next(), values.next()), (Some(value), None) if value.as_encoded_bytes() == b"true")
    {
        return Err(Status::invalid_argument(
            "the metadata workload.spiffe.io: true is required, exactly once",
        ));
    }
    let peer = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred);
    if peer.is_none_or(|peer| peer.uid() != owner.as_raw()) {
        return Err(Status::permission_denied(
            "no identity issued: this Workload API answers the daemon of `dev` only",
        ));
    }
    Ok(request)
}

struct DevWorkloadApiService {
    registrations: Registrations,
}

#[derive(Serialize)]
struct DevSvidClaims<'a> {
    iss: &'a str,
    sub: &'a str,
    aud: &'a [String],
    iat: u64,
    exp: u64,
}

impl DevWorkloadApiService {
    fn issue(&self, id: &SpiffeId) -> Result<X509svid, Status> {
        let authority = &self.registrations.authority;
        let issued = authority
            .issue(id, self.registrations.clock.now())
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(X509svid {
            spiffe_id: id.to_string(),
            x509_svid: issued.certificate.to_vec(),
            x509_svid_key: issued.key.to_vec(),
            bundle: authority.certificate().to_vec(),
            hint: String::new(),
        })
    }

    fn sign(&self, spiffe_id: &SpiffeId, audience: &[String]) -> Result<Jwtsvid, Status> {
        let now = self.registrations.clock.now();
        let claims = DevSvidClaims {
            iss: &self.registrations.issuer,
            sub: spiffe_id.as_str(),
            aud: audience,
            iat: seconds(now),
            exp: seconds(now + SVID_LIFETIME),
        };
        let svid = self
            .registrations
            .key
            .sign(&claims)
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Jwtsvid {
            spiffe_id: spiffe_id.to_string(),
            svid,
            hint: String::new(),
        })
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for DevWorkloadApiService {
    async fn fetch_x509svid(
        &self,
        _: Request<X509svidRequest>,
    ) -> Result<Response<BoxStream<X509svidResponse>>, Status> {
        let svids = self
            .registrations
            .spiffe_ids
            .iter()
            .map(|id| self.issue(id));
        let svids = svids.collect::<Result<_, _>>()?;
        // An hour is longer than any client of `dev` keeps its stream.
        let message = Ok(X509svidResponse { svids });
        let stream = tokio_stream::once(message).chain(tokio_stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let JwtsvidRequest {
            audience,
            spiffe_id,
        } = request.into_inner();
        if audience.is_empty() || audience.iter().any(String::is_empty) {
            return Err(Status::invalid_argument("audience must be specified"));
        }
        let registered = self.registrations.spiffe_ids.iter();
        let requested: Vec<&SpiffeId> = if spiffe_id.is_empty() {
            registered.collect()
        } else {
            let requested = SpiffeId::parse(&spiffe_id).map_err(|error| {
                Status::invalid_argument(format!("invalid requested SPIFFE ID: {error}"))
            })?;
            registered.filter(|id| **id == requested).collect()
        };
        if requested.is_empty() {
            return Err(Status::permission_denied("no identity issued"));
        }
        let svids = requested
            .into_iter()
            .map(|id| self.sign(id, &audience))
            .collect::<Result<_, _>>()?;
        Ok(Response::new(JwtsvidResponse { svids }))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<JwtBundlesRequest>,
    ) -> Result<Response<BoxStream<JwtBundlesResponse>>, Status> {
        let trust_domain = format!("spiffe://{}", self.registrations.trust_domain);
        let bundles = [(trust_domain, self.registrations.key.jwks().into_bytes())].into();
        // The key never changes, so one message is enough. The stream stays open, as the standard
        // requires.
        let stream =
            tokio_stream::once(Ok(JwtBundlesResponse { bundles })).chain(tokio_stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests;
