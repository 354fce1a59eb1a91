//! A Workload API that returns any token that the test has made, like a provider that is configured
//! wrong or broken.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use awsvid::svid::proto::workload::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use awsvid::svid::proto::workload::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse,
    X509svidRequest, X509svidResponse,
};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

#[path = "../../support/unsigned_token.rs"]
mod unsigned_token;

use unsigned_token::raw_token;

/// A server that runs until it is dropped.
pub(crate) struct Tokens {
    socket: PathBuf,
    _runtime: Runtime,
}

struct Api {
    header: String,
    claims: String,
}

impl Tokens {
    /// Serves tokens with this header and these claims, and an invalid signature. Only `{sub}`,
    /// `{now}` and `{end}` are replaced in them.
    pub(crate) fn start(folder: &Path, header: &str, claims: &str) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let socket = folder.join("tokens.sock");
        // From an earlier start.
        let _ = std::fs::remove_file(&socket);
        let listener = runtime
            .block_on(async { UnixListener::bind(&socket) })
            .expect("a socket");
        let api = SpiffeWorkloadApiServer::new(Api {
            header: header.to_owned(),
            claims: claims.to_owned(),
        });
        let server = tonic::transport::Server::builder().add_service(api);
        runtime.spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        Self {
            socket,
            _runtime: runtime,
        }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Api {
    async fn fetch_x509svid(
        &self,
        _: Request<X509svidRequest>,
    ) -> Result<Response<BoxStream<X509svidResponse>>, Status> {
        Err(Status::unimplemented("tokens only"))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let spiffe_id = request.into_inner().spiffe_id;
        let now = unsigned_token::seconds(SystemTime::now());
        let claims = self
            .claims
            .replace("{sub}", &spiffe_id)
            .replace("{now}", &now.to_string());
        let claims = claims.replace("{end}", &(now + 600).to_string());
        let svid = raw_token(&self.header, &claims);
        Ok(Response::new(JwtsvidResponse {
            svids: vec![Jwtsvid {
                spiffe_id,
                svid,
                hint: String::new(),
            }],
        }))
    }

    async fn fetch_jwt_bundles(
        &self,
        _: Request<JwtBundlesRequest>,
    ) -> Result<Response<BoxStream<JwtBundlesResponse>>, Status> {
        Err(Status::unimplemented("tokens only"))
    }
}
