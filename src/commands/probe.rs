//! `awsvid probe`: liveness and readiness of the local daemon, over the status socket.

use std::path::PathBuf;
use std::time::Duration;

use super::{ConfigFile, StatusSocketError, local_client, trusted_socket};
use crate::exit_status::ExitStatus;
use clap::{Args, ValueEnum};

/// Time limit of the response. The kubelet has a limit of its own.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_RESPONSE: usize = 64 * 1024;

/// Checks that the local daemon is alive or ready, for probes that run a command
///
/// The request uses the status socket, which only root can open. So a flood of requests to the
/// operators' TCP address does not delay a probe. Prints one line, with the reason if the daemon is
/// not ready.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  awsvid probe ready
  awsvid probe live --socket /run/awsvid/status.sock

Exit status: 0 if the condition holds, 1 if not.")]
pub struct Probe {
    /// Condition of the daemon to check
    condition: ProbeKind,
    #[command(flatten)]
    config: ConfigFile,
    /// Path of awsvid's status socket, instead of the configuration's
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
}

/// Condition of the daemon that a probe checks.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProbeKind {
    /// The daemon answers. If it does not for some time, restart it.
    Live,
    /// Workloads are served, as in `/readyz`.
    Ready,
}

impl Probe {
    /// Probes once and prints the result.
    #[expect(clippy::print_stdout, reason = "the output of this command")]
    pub fn run(&self) -> ExitStatus {
        let fetched = local_client::block_on(self.fetch());
        let (text, status) = match fetched.unwrap_or_else(|error| Err(error.into())) {
            Ok((200, text)) => (text, ExitStatus::Success),
            Ok((_, text)) => (text, ExitStatus::Failure),
            Err(error) => (error.to_string(), ExitStatus::Failure),
        };
        println!("{}", text.trim_end());
        status
    }

    async fn fetch(&self) -> Result<(u16, String), StatusSocketError> {
        let socket = self.config.status_socket(self.socket.as_deref())?;
        let path = match self.condition {
            ProbeKind::Live => "/healthz",
            ProbeKind::Ready => "/readyz",
        };
        let answer =
            trusted_socket::get_of_operator(&socket, path, MAX_RESPONSE, RESPONSE_TIMEOUT).await?;
        Ok((
            answer.status,
            String::from_utf8_lossy(&answer.body).into_owned(),
        ))
    }
}
