//! `awsvid probe`: whether the daemon of this container or machine lives, or is ready, over the status socket.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use nix::unistd::geteuid;

use super::{ConfigFile, trusted_socket};

/// For one answer. The kubelet has a limit of its own.
const PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_MAX: usize = 64 * 1024;

/// Reports whether the daemon of this machine or container lives, or is ready: for probes that run a command.
///
/// The request goes over the status socket, which is root's. A flood of the operators' TCP address therefore keeps no probe from
/// its answer. Prints one line, with the reason if the daemon is not ready.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  awsvid probe ready
  awsvid probe live --socket /run/awsvid/status.sock

Exit status: 0 if it is so, 1 if not.")]
pub struct Probe {
    /// Which of the two.
    what: What,
    #[command(flatten)]
    config: ConfigFile,
    /// awsvid's status socket, instead of the configuration's.
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
}

/// A question.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Whether the daemon answers: if not for long, it has to be started again.
    Live,
    /// Whether workloads are served: the same as `/readyz`.
    Ready,
}

impl Probe {
    /// Asks.
    #[expect(clippy::print_stdout, reason = "a command whose output is for people")]
    pub fn run(&self) -> ExitCode {
        let (said, status) = match self.ask() {
            Ok((200, said)) => (said, ExitCode::SUCCESS),
            Ok((_, said)) | Err(said) => (said, ExitCode::FAILURE),
        };
        println!("{}", said.trim_end());
        status
    }

    fn ask(&self) -> Result<(u16, String), String> {
        let socket = self.config.status_socket(self.socket.as_deref())?;
        let path = match self.what {
            What::Live => "/healthz",
            What::Ready => "/readyz",
        };
        let owners = [0, geteuid().as_raw()];
        let answer = trusted_socket::get(
            &socket,
            &owners,
            path,
            ANSWER_MAX,
            Instant::now() + PATIENCE,
        )?;
        Ok((
            answer.status,
            String::from_utf8_lossy(&answer.body).into_owned(),
        ))
    }
}
