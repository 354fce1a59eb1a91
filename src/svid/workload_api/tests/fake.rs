//! Fake Workload APIs, for replies that a real agent cannot be made to send.

use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Response, Status};

use crate::svid::proto::workload::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use crate::svid::proto::workload::{Jwtsvid, JwtsvidRequest, JwtsvidResponse};

/// Reply to the request with this number (from 0), or `None` for no reply at all.
pub(super) type WorkloadApiScript =
    dyn Fn(usize) -> Option<Result<JwtsvidResponse, Status>> + Send + Sync;

/// A Workload API that replies by a script, and is as strict about the header as SPIRE.
#[derive(Clone)]
struct WorkloadApiService {
    script: Arc<WorkloadApiScript>,
    requests: ReceivedRequests,
}

/// The requests that arrived, with their metadata.
#[derive(Clone, Default)]
pub(super) struct ReceivedRequests(Arc<Mutex<Vec<(MetadataMap, JwtsvidRequest)>>>);

impl ReceivedRequests {
    pub(super) fn all(&self) -> Vec<(MetadataMap, JwtsvidRequest)> {
        self.0.lock().unwrap().clone()
    }

    pub(super) fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApiService {
    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let header: Vec<_> = request
            .metadata()
            .get_all("workload.spiffe.io")
            .iter()
            .collect();
        if header != ["true"] {
            return Err(Status::invalid_argument(
                "security header missing from request",
            ));
        }
        let number = {
            let mut requests = self.requests.0.lock().unwrap();
            requests.push((request.metadata().clone(), request.into_inner()));
            requests.len() - 1
        };
        match (self.script)(number) {
            Some(answer) => answer.map(Response::new),
            None => pending().await,
        }
    }
}

/// A running fake, which stops when the value is dropped.
pub(super) struct FakeWorkloadApi {
    pub(super) requests: ReceivedRequests,
    task: JoinHandle<()>,
}

impl Drop for FakeWorkloadApi {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn router(script: Arc<WorkloadApiScript>) -> (Router, ReceivedRequests) {
    let requests = ReceivedRequests::default();
    let service = WorkloadApiService {
        script,
        requests: requests.clone(),
    };
    (
        Server::builder().add_service(SpiffeWorkloadApiServer::new(service)),
        requests,
    )
}

/// Starts a fake that listens at `path`.
pub(super) fn at(path: &Path, script: Arc<WorkloadApiScript>) -> FakeWorkloadApi {
    let (router, requests) = router(script);
    let listener = UnixListener::bind(path).unwrap();
    let task = tokio::spawn(async move {
        router
            .serve_with_incoming(UnixListenerStream::new(listener))
            .await
            .unwrap();
    });
    FakeWorkloadApi { requests, task }
}

/// Starts a fake at a free port of this address.
pub(super) async fn at_tcp(
    address: &str,
    script: Arc<WorkloadApiScript>,
) -> (FakeWorkloadApi, std::net::SocketAddr) {
    let (router, requests) = router(script);
    let listener = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
    let bound = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        router
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    (FakeWorkloadApi { requests, task }, bound)
}

/// Accepts HTTP/2 connections below gRPC and passes each to `serve`.
pub(super) fn at_h2<F>(
    path: &Path,
    serve: impl Fn(h2::server::Connection<tokio::net::UnixStream, bytes::Bytes>) -> F + Send + 'static,
) -> JoinHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(connection) = h2::server::handshake(stream).await {
                serve(connection).await;
            }
        }
    })
}

/// Returns a reply with these (SPIFFE ID, token) pairs.
pub(super) fn svids<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> JwtsvidResponse {
    let svid = |(id, svid): (&str, String)| Jwtsvid {
        spiffe_id: id.to_owned(),
        svid,
        hint: String::new(),
    };
    JwtsvidResponse {
        svids: pairs.into_iter().map(svid).collect(),
    }
}

/// Returns the path for a socket in `dir`.
pub(super) fn socket(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("agent.sock")
}
