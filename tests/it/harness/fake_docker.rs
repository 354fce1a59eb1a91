//! A fake Docker engine that knows one container, for SPIRE's attestor `docker`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use serde_json::json;

/// An engine that runs until it is dropped.
pub(crate) struct FakeDocker {
    socket: PathBuf,
    state: Arc<EngineState>,
}

struct EngineState {
    id: String,
    label: (String, String),
    queries: AtomicUsize,
    ended: AtomicBool,
}

impl FakeDocker {
    /// Listens in `folder`, and knows the container `id` with this label.
    pub(crate) fn start(folder: &Path, id: &str, (name, value): (&str, &str)) -> Self {
        let socket = folder.join("docker.sock");
        let listener = UnixListener::bind(&socket).expect("the engine's socket");
        let label = (name.to_owned(), value.to_owned());
        let (queries, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
        let state = Arc::new(EngineState {
            id: id.to_owned(),
            label,
            queries,
            ended,
        });
        let engine = Self {
            socket,
            state: state.clone(),
        };
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if state.ended.load(Ordering::SeqCst) {
                    return;
                }
                let state = state.clone();
                thread::spawn(move || state.serve(client));
            }
        });
        engine
    }

    /// Returns the agent's configuration of the attestor.
    pub(crate) fn attestor(&self) -> String {
        let socket = self.socket.display();
        format!(
            "WorkloadAttestor \"docker\" {{ plugin_data {{ docker_socket_path = \"unix://{socket}\" }} }}"
        )
    }

    /// Returns the number of queries about a container.
    pub(crate) fn queries(&self) -> usize {
        self.state.queries.load(Ordering::SeqCst)
    }
}

impl Drop for FakeDocker {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        // Wakes the thread in accept(2).
        let _ = UnixStream::connect(&self.socket);
    }
}

impl EngineState {
    fn serve(&self, client: UnixStream) {
        let mut lines = BufReader::new(&client).lines().map_while(Result::ok);
        while let Some(request) = lines.next() {
            // These requests have no body.
            if lines.by_ref().all(|line| !line.is_empty())
                || self.answer(&client, &request).is_err()
            {
                return;
            }
        }
    }

    /// Responds to a request line such as `GET /v1.47/containers/<id>/json HTTP/1.1`.
    fn answer(&self, mut client: &UnixStream, request: &str) -> io::Result<()> {
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (status, body) = if path.ends_with("/_ping") {
            ("200 OK", String::new())
        } else if path.contains("/containers/") {
            self.queries.fetch_add(1, Ordering::SeqCst);
            let (name, value) = &self.label;
            let container = json!({ "Id": self.id, "Config": { "Labels": { name: value } } });
            if path.contains(&self.id) {
                ("200 OK", container.to_string())
            } else {
                ("404 Not Found", String::new())
            }
        } else {
            ("404 Not Found", String::new())
        };
        let length = body.len();
        let head = "Content-Type: application/json\r\nApi-Version: 1.47";
        write!(
            client,
            "HTTP/1.1 {status}\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    }
}
