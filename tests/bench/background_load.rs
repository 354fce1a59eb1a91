//! Background load: the other processes and connections of a busy node, none of them a client of
//! the daemon.
#![allow(unsafe_code, reason = "fork, in a part that has one thread")]

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};

use crate::BenchError;
use crate::caller::become_user;
use crate::process::Part;

/// The user of the processes.
const USER: u32 = 61109;

/// Processes and connections, until it is ended.
pub(crate) struct BackgroundLoad(Part);

impl BackgroundLoad {
    /// Starts them, in a cgroup of their own.
    pub(crate) fn start(
        processes: usize,
        connections: usize,
        cgroup: &Path,
    ) -> Result<Self, BenchError> {
        let cgroup = cgroup.to_str().ok_or("the cgroup's path is not UTF-8")?;
        let mut part = Part::start(&[
            "background",
            &processes.to_string(),
            &connections.to_string(),
            cgroup,
        ])?;
        match part.next_line()?.as_str() {
            "ready" => Ok(Self(part)),
            other => Err(format!("unexpected line of the background load: {other:?}").into()),
        }
    }

    /// Ends them, and waits until they are gone.
    pub(crate) fn end(self) -> Result<(), BenchError> {
        self.0.end()
    }
}

/// Runs the part `background`.
pub(crate) fn run(processes: usize, connections: usize, cgroup: &Path) -> Result<(), BenchError> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")?;
    let descriptors = u64::try_from(2 * connections)? + 100;
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors)?;
    become_user(USER)?;
    // Before there are connections, which each of them would inherit.
    let children = (0..processes)
        .map(|_| sleeper())
        .collect::<Result<Vec<_>, _>>()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut ends = Vec::new();
    for _ in 0..connections {
        let one = TcpStream::connect(address)?;
        ends.push((one, listener.accept()?));
    }
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    for child in &children {
        kill(*child, Signal::SIGKILL)?;
    }
    for child in children {
        waitpid(child, None)?;
    }
    Ok(())
}

/// Starts a child that does nothing until it is killed, by this process or with it.
fn sleeper() -> Result<Pid, BenchError> {
    // SAFETY: this part has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let _ = set_pdeathsig(Signal::SIGKILL);
            loop {
                pause();
            }
        }
    }
}
