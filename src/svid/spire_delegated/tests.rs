use std::sync::{Arc, Mutex};

use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Response;
use tonic::transport::Server;

use super::*;
use crate::svid::proto::spire::api::agent::delegatedidentity::v1::FetchJwtsviDsResponse;
use crate::svid::proto::spire::api::agent::delegatedidentity::v1::delegated_identity_server::{
    DelegatedIdentity, DelegatedIdentityServer,
};
use crate::svid::proto::spire::api::types::{Jwtsvid, Spiffeid};

const DEADLINE: Duration = Duration::from_secs(5);

type Requests = Arc<Mutex<Vec<FetchJwtsviDsRequest>>>;

/// An agent that sends the given reply, or never replies without one.
struct FakeAdminApi {
    answer: Option<Result<FetchJwtsviDsResponse, Status>>,
    requests: Requests,
}

#[tonic::async_trait]
impl DelegatedIdentity for FakeAdminApi {
    async fn fetch_jwtsvi_ds(
        &self,
        request: Request<FetchJwtsviDsRequest>,
    ) -> Result<Response<FetchJwtsviDsResponse>, Status> {
        self.requests.lock().unwrap().push(request.into_inner());
        match &self.answer {
            Some(answer) => answer.clone().map(Response::new),
            None => std::future::pending().await,
        }
    }
}

/// A running fake. It stops with its connections when the value is dropped.
struct RunningAdminApi(Option<Runtime>, Requests);

impl Drop for RunningAdminApi {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn run(path: &Path, answer: Option<Result<FetchJwtsviDsResponse, Status>>) -> RunningAdminApi {
    let requests = Requests::default();
    let service = DelegatedIdentityServer::new(FakeAdminApi {
        answer,
        requests: requests.clone(),
    });
    let _ = std::fs::remove_file(path);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let serving = async move {
        let listener = UnixListener::from_std(listener).unwrap();
        Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener))
            .await
            .unwrap();
    };
    runtime.spawn(serving);
    RunningAdminApi(Some(runtime), requests)
}

fn shop(token: &str) -> FetchJwtsviDsResponse {
    let id = Spiffeid {
        trust_domain: "example.org".to_owned(),
        path: "/shop".to_owned(),
    };
    let (token, hint) = (token.to_owned(), "shop".to_owned());
    FetchJwtsviDsResponse {
        svids: vec![Jwtsvid {
            token,
            id: Some(id),
            hint,
            ..Jwtsvid::default()
        }],
    }
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    (folder, path)
}

/// Returns the token of the only SVID, or the error.
async fn token(agent: &SpireDelegated) -> Result<String, SourceError> {
    let svids = agent.fetch_for_pid(4711, "minio").await?;
    let [svid] = &svids[..] else {
        panic!("{svids:?}")
    };
    assert_eq!(
        (svid.spiffe_id.as_str(), svid.hint.as_deref()),
        ("spiffe://example.org/shop", Some("shop"))
    );
    Ok(svid.token.to_string())
}

#[tokio::test]
async fn query_has_only_the_pid() {
    let (_folder, path) = socket();
    let running = run(&path, Some(Ok(shop("a"))));
    let agent = SpireDelegated::new(&path, DEADLINE);
    assert_eq!(token(&agent).await.as_deref(), Ok("a"));
    let requests = running.1.lock().unwrap().clone();
    let expected = FetchJwtsviDsRequest {
        audience: vec!["minio".to_owned()],
        selectors: Vec::new(),
        pid: 4711,
    };
    assert_eq!(requests, [expected]);
    let printed = format!(
        "{:?} {:?}",
        agent.fetch_for_pid(4711, "minio").await,
        shop("the-token")
    );
    assert!(
        !printed.contains("the-token") && !printed.contains("\"a\""),
        "{printed}"
    );
}

#[tokio::test]
async fn restarted_or_replaced_agent_is_used_at_once() {
    let (_folder, path) = socket();
    let first = run(&path, Some(Ok(shop("first"))));
    let agent = SpireDelegated::new(&path, DEADLINE);
    assert_eq!(token(&agent).await.as_deref(), Ok("first"));
    // The first agent still runs.
    let second = run(&path, Some(Ok(shop("second"))));
    assert_eq!(token(&agent).await.as_deref(), Ok("second"));
    drop((first, second));
    // Their connections close a moment later.
    let ended = async {
        while token(&agent).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, ended).await.unwrap();
    let unavailable = token(&agent).await.unwrap_err();
    assert!(
        matches!(&unavailable, SourceError::Unavailable(text) if text.contains("nothing listens at")),
        "{unavailable:?}"
    );
    let _third = run(&path, Some(Ok(shop("third"))));
    assert_eq!(token(&agent).await.as_deref(), Ok("third"));
}

#[tokio::test]
async fn unanswered_call_is_abandoned_without_retry() {
    let (_folder, path) = socket();
    let running = run(&path, None);
    let late = token(&SpireDelegated::new(&path, Duration::from_millis(200)))
        .await
        .unwrap_err();
    assert!(
        matches!(&late, SourceError::Unavailable(text) if text.contains("did not answer within 200ms")),
        "{late:?}"
    );
    assert_eq!(running.1.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn rejection_names_the_fix() {
    type ToError = fn(String) -> SourceError;
    let (denied, broken, wrong): (ToError, ToError, ToError) = (
        SourceError::Denied,
        SourceError::Unavailable,
        SourceError::Misconfigured,
    );
    let table = [
        (
            Status::permission_denied("no identity issued"),
            denied,
            "no registration entry",
        ),
        (
            Status::permission_denied("caller not configured as an authorized delegate"),
            wrong,
            "`authorized_delegates`",
        ),
        (
            Status::invalid_argument("could not parse provided selectors"),
            wrong,
            "upgrade SPIRE to 1.10.2 or newer",
        ),
        (
            Status::unimplemented("unknown service"),
            wrong,
            "set `admin_socket` in [identity]",
        ),
        (
            Status::unavailable("workload attestation failed"),
            broken,
            "workload attestation failed",
        ),
        (Status::internal("two\nlines"), broken, "two lines"),
    ];
    for (status, is, words) in table {
        let (_folder, path) = socket();
        let _running = run(&path, Some(Err(status.clone())));
        let error = token(&SpireDelegated::new(&path, DEADLINE))
            .await
            .unwrap_err();
        let text = error.to_string();
        assert_eq!(error, is(text.clone()), "{status:?}");
        assert!(text.contains(words) && !text.contains('\n'), "{text}");
    }
}

#[tokio::test]
async fn socket_error_names_the_cause() {
    let (_folder, path) = socket();
    let missing = SpireDelegated::new(&path, DEADLINE)
        .connect()
        .await
        .unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("where `admin_socket_path` is set"),
        "{missing}"
    );
    let denied = admin_socket_error(
        &Endpoint::Unix(path),
        &std::io::ErrorKind::PermissionDenied.into(),
    );
    assert!(denied.contains("mode 0770"), "{denied}");
}
