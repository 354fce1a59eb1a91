//! The daemon's counterparts: a SPIFFE Workload API and an STS, in the bench's own process, which
//! reply after a set time, and count. They verify nothing; the integration tests have those that
//! do.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::UnixListenerStream;

use awsvid::svid::proto::workload::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use awsvid::svid::proto::workload::{Jwtsvid, JwtsvidRequest, JwtsvidResponse};

use crate::{BenchError, machine};

#[path = "../support/unsigned_token.rs"]
mod unsigned_token;

use unsigned_token::token_of;

pub(crate) const TRUST_DOMAIN: &str = "bench.example";
/// About as long as AWS's own.
const SESSION_TOKEN: usize = 1024;

/// The counters of both servers.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) tokens: u32,
    pub(crate) sessions: u32,
    /// The time that all of these took here, from request to response.
    pub(crate) spent: Duration,
    /// The time of the last session's response, by the machine's monotonic clock.
    pub(crate) answered: Duration,
}

/// Counts, and delays each reply. Cheap to clone.
#[derive(Debug, Clone)]
struct CountingDelay {
    delay: Duration,
    counts: Arc<Mutex<Counts>>,
}

impl CountingDelay {
    async fn serve(&self, note: impl FnOnce(&mut Counts)) {
        let begin = machine::monotonic();
        if !self.delay.is_zero() {
            sleep(self.delay).await;
        }
        let end = machine::monotonic();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.spent += end - begin;
        note(&mut counts);
    }
}

/// Both servers, which end with this value.
pub(crate) struct Upstream {
    replies: CountingDelay,
    socket: PathBuf,
    sts: String,
    ca: Option<PathBuf>,
    _runtime: Runtime,
}

impl Upstream {
    /// Starts them with their files in `folder`. Each response takes `delay`. With `tls` the STS
    /// speaks TLS, as AWS's does.
    pub(crate) fn start(folder: &Path, delay: Duration, tls: bool) -> Result<Self, BenchError> {
        let runtime = Runtime::new()?;
        let replies = CountingDelay {
            delay,
            counts: Arc::default(),
        };
        let socket = folder.join("agent.sock");
        let (ca, acceptor) = if tls {
            certificate(folder).map(|(ca, tls)| (Some(ca), Some(tls)))?
        } else {
            (None, None)
        };
        let sts = runtime.block_on(async {
            let agent = UnixListenerStream::new(UnixListener::bind(&socket)?);
            let service = SpiffeWorkloadApiServer::new(Agent(replies.clone()));
            tokio::spawn(
                tonic::transport::Server::builder()
                    .add_service(service)
                    .serve_with_incoming(agent),
            );
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let address = listener.local_addr()?;
            tokio::spawn(sts(listener, acceptor, replies.clone()));
            Ok::<_, BenchError>(address)
        })?;
        let scheme = if tls { "https" } else { "http" };
        Ok(Self {
            replies,
            socket,
            sts: format!("{scheme}://{sts}"),
            ca,
            _runtime: runtime,
        })
    }

    /// Returns the counts so far.
    pub(crate) fn counts(&self) -> Counts {
        *self
            .replies
            .counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `[identity]` and `[sts]`.
    pub(crate) fn configuration(&self) -> String {
        let ca = self
            .ca
            .as_ref()
            .map(|ca| format!("ca_file = {:?}\n", ca.display().to_string()))
            .unwrap_or_default();
        let socket = format!("unix://{}", self.socket.display());
        format!(
            "[identity]\nworkload_api_socket = {socket:?}\naudience = \"bench\"\n\n\
             [sts]\nregion = \"eu-central-1\"\nendpoint = {:?}\n{ca}",
            self.sts
        )
    }
}

/// The server of the Workload API.
struct Agent(CountingDelay);

#[tonic::async_trait]
impl SpiffeWorkloadApi for Agent {
    async fn fetch_jwtsvid(
        &self,
        request: tonic::Request<JwtsvidRequest>,
    ) -> Result<tonic::Response<JwtsvidResponse>, tonic::Status> {
        self.0.serve(|counts| counts.tokens += 1).await;
        let JwtsvidRequest {
            audience,
            spiffe_id,
        } = request.into_inner();
        let svid = token(&spiffe_id, audience.first().map_or("", String::as_str));
        let svids = vec![Jwtsvid {
            spiffe_id,
            svid,
            hint: String::new(),
        }];
        Ok(tonic::Response::new(JwtsvidResponse { svids }))
    }
}

/// Returns a JWT-SVID that passes every check except that of its signature, which only STS can
/// make.
pub(crate) fn token(spiffe_id: &str, audience: &str) -> String {
    token_of(spiffe_id, audience, SystemTime::now(), 300, 0)
}

async fn sts(listener: TcpListener, tls: Option<TlsAcceptor>, replies: CountingDelay) {
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, replies) = (tls.clone(), replies.clone());
        tokio::spawn(async move {
            match tls {
                None => serve(stream, replies).await,
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => serve(stream, replies).await,
                    Err(error) => eprintln!("bench: TLS with the daemon: {error}"),
                },
            }
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, replies: CountingDelay) {
    let service = hyper::service::service_fn(|request: Request<Incoming>| async {
        // The daemon's own readiness probe is answered, and counted, like any other request.
        let _ = request.into_body().collect().await;
        let answer = session();
        replies
            .serve(|counts| {
                counts.sessions += 1;
                counts.answered = machine::monotonic();
            })
            .await;
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(answer))))
    });
    // An error is the daemon's end.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn session() -> String {
    let expiration =
        humantime::format_rfc3339_seconds(SystemTime::now() + Duration::from_secs(3600));
    format!(
        "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
         <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIAIOSFODNN7EXAMPLE</AccessKeyId>\
         <SecretAccessKey>wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY00</SecretAccessKey>\
         <SessionToken>{}</SessionToken><Expiration>{expiration}</Expiration></Credentials>\
         </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
        "t".repeat(SESSION_TOKEN)
    )
}

/// Makes a certificate for 127.0.0.1, which is its own authority. Returns its file, and TLS with
/// it.
fn certificate(folder: &Path) -> Result<(PathBuf, TlsAcceptor), BenchError> {
    use tokio_rustls::rustls::ServerConfig;
    use tokio_rustls::rustls::crypto::aws_lc_rs::default_provider;
    use tokio_rustls::rustls::pki_types::PrivateKeyDer;

    let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
    let ca = folder.join("ca.pem");
    std::fs::write(&ca, certified.cert.pem())?;
    let key = PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)?;
    Ok((ca, TlsAcceptor::from(Arc::new(config))))
}
