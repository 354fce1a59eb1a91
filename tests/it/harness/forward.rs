//! A forward from one network namespace, which may be connected to nothing, to an address in
//! another.

use std::fs::File;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket;
use nix::unistd::Pid;

pub(crate) enum Network {
    /// The namespace of the tests.
    Own,
    /// The namespace of a process.
    Of(Pid),
}

impl Network {
    /// Moves the calling thread into it. The thread must end afterwards.
    fn enter(&self) {
        if let Self::Of(pid) = self {
            let file = File::open(format!("/proc/{pid}/ns/net")).expect("a network namespace");
            setns(file, CloneFlags::CLONE_NEWNET).expect("enter a network namespace");
        }
    }

    /// Binds a listener in it, which stays usable outside.
    pub(crate) fn bind(self, address: SocketAddr) -> TcpListener {
        let bind = move || {
            self.enter();
            TcpListener::bind(address).expect("a free port")
        };
        thread::spawn(bind).join().expect("the listener's thread")
    }
}

/// Forwards connections until it is dropped.
pub(crate) struct Forward {
    listener: TcpListener,
}

impl Forward {
    /// Forwards from an address in one network to one in another. For port 0 the kernel picks a
    /// port.
    pub(crate) fn start(
        from: Network,
        address: SocketAddr,
        to: Network,
        target: SocketAddr,
    ) -> Self {
        let listener = from.bind(address);
        let accepting = listener.try_clone().expect("a second handle");
        thread::spawn(move || {
            to.enter();
            for inside in accepting.incoming().map_while(Result::ok) {
                if let Ok(outside) = TcpStream::connect(target) {
                    // A client that has closed its connection gets nothing.
                    let _ = pass(&inside, &outside).and_then(|()| pass(&outside, &inside));
                }
            }
        });
        Self { listener }
    }

    /// Returns the address at which it listens.
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
