//! A proxy in front of a unix socket that a test can pause, for tests of what happens while a
//! response is awaited.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Accepts connections at once, and forwards their bytes while it is open. It starts closed.
pub(crate) struct PausableProxy {
    path: PathBuf,
    state: Arc<ProxyState>,
}

#[derive(Default)]
struct ProxyState {
    at: Mutex<At>,
    changed: Condvar,
}

#[derive(Default)]
struct At {
    arrivals: usize,
    open: bool,
    ended: bool,
}

impl PausableProxy {
    /// Listens at `path`, in front of the socket `to`.
    pub(crate) fn start(path: &Path, to: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("the gate's socket");
        let gate = Self {
            path: path.to_owned(),
            state: Arc::default(),
        };
        let (state, to) = (gate.state.clone(), to.to_owned());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if state.at.lock().unwrap().ended {
                    return;
                }
                let (state, to) = (state.clone(), to.clone());
                thread::spawn(move || state.pass(client, &to));
            }
        });
        gate
    }

    /// Waits until `count` connections have arrived since the start, open or not.
    pub(crate) fn await_arrivals(&self, count: usize) {
        let at = self.state.at.lock().unwrap();
        let (at, _) = self
            .state
            .changed
            .wait_timeout_while(at, TIMEOUT, |at| at.arrivals < count)
            .unwrap();
        assert!(
            at.arrivals >= count,
            "{} connections reached the gate",
            at.arrivals
        );
    }

    /// Returns the number of connections that have arrived.
    pub(crate) fn arrivals(&self) -> usize {
        self.state.at.lock().unwrap().arrivals
    }

    /// Opens or closes it, for waiting and for future connections.
    pub(crate) fn set_open(&self, open: bool) {
        self.state.at.lock().unwrap().open = open;
        self.state.changed.notify_all();
    }
}

impl ProxyState {
    fn pass(&self, client: UnixStream, to: &Path) {
        let mut at = self.at.lock().unwrap();
        at.arrivals += 1;
        self.changed.notify_all();
        let at = self
            .changed
            .wait_while(at, |at| !at.open && !at.ended)
            .unwrap();
        let ended = at.ended;
        drop(at);
        if let (false, Ok(server)) = (ended, UnixStream::connect(to)) {
            let (from, back) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || copy(from, back));
            copy(server, client);
        }
    }
}

fn copy(mut from: UnixStream, mut to: UnixStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

impl Drop for PausableProxy {
    fn drop(&mut self) {
        self.state.at.lock().unwrap().ended = true;
        self.state.changed.notify_all();
        // Wakes the thread in accept(2).
        let _ = UnixStream::connect(&self.path);
    }
}
