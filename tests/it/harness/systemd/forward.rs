//! A way from the machine's network namespace, which is connected to nothing, to one address outside.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket;

/// Passes connections on until it is dropped.
pub(crate) struct Forward {
    listener: TcpListener,
}

impl Forward {
    pub(super) fn start(namespace: &Path, to: SocketAddr) -> Self {
        let namespace = File::open(namespace).expect("the machine's network namespace");
        // A thread of its own: it ends in the namespace that it has entered. The listener stays usable outside.
        let bind = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the machine's network namespace");
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port in the machine")
        };
        let listener = thread::spawn(bind).join().expect("the listener's thread");
        let accepting = listener.try_clone().expect("a second handle");
        thread::spawn(move || {
            for inside in accepting.incoming().map_while(Result::ok) {
                if let Ok(outside) = TcpStream::connect(to) {
                    pass(&inside, &outside).expect("second handles");
                    pass(&outside, &inside).expect("second handles");
                }
            }
        });
        Self { listener }
    }

    /// Where it listens inside.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("its own address")
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // Ends accept(2) in the thread.
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
    }
}

/// Copies from one to the other in a thread that ends with either.
fn pass(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Read);
    });
    Ok(())
}
