use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;

use bytes::Bytes;
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{DuplexStream, duplex};
use tokio::time::sleep;

use super::*;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Serves one connection as the endpoint does, where the answer comes after `answer`.
async fn serve(stream: DuplexStream, answer: impl AsyncFn()) -> hyper::Result<()> {
    let (state, answer) = (ResponseState::default(), &answer);
    let service = service_fn(|_: Request<hyper::body::Incoming>| {
        state.set_answering();
        let state = &state;
        async move {
            state.wait_for(pin!(answer())).await;
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"answer"))))
        }
    });
    let mut wire = GuardedStream::new(stream, true, &state);
    http1::Builder::new()
        .keep_alive(false)
        .serve_connection(TokioIo::new(&mut wire), service)
        .await
}

async fn answered(client: &mut DuplexStream) -> String {
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(start_paused = true)]
async fn answer_is_written_at_once_or_later() {
    for after in [Duration::ZERO, Duration::from_secs(4)] {
        let (mut client, server) = duplex(4096);
        client.write_all(REQUEST).await.unwrap();
        let wait = async || match after {
            Duration::ZERO => {}
            after => sleep(after).await,
        };
        let (served, answer) = tokio::join!(serve(server, wait), answered(&mut client));
        served.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nanswer"),
            "{answer}"
        );
    }
}

/// The answer's future is dropped when the client closes, so that the record is `aborted`.
#[tokio::test(start_paused = true)]
async fn answer_is_dropped_when_client_closes() {
    // The client closes before the answer is polled, and while it is pending.
    for stays in [Duration::ZERO, Duration::from_secs(1)] {
        let (mut client, server) = duplex(4096);
        client.write_all(REQUEST).await.unwrap();
        let going = async {
            sleep(stays).await;
            drop(client);
        };
        let served = timeout(
            Duration::from_secs(4),
            serve(server, async || pending().await),
        );
        let (served, ()) = tokio::join!(served, going);
        assert!(
            served
                .expect("it ends with the client")
                .unwrap_err()
                .is_incomplete_message()
        );
    }
}
