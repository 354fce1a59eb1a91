//! `awsvid status`: the daemon's cache entries and the state of its upstreams, over the status
//! socket.

mod table;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::output::OutputFormat;
use super::terminal_style::TerminalStyle;
use super::{ConfigFile, StatusSocketError, local_client, trusted_socket};
use crate::clock::Clock;
use crate::exit_status::ExitStatus;

/// Time limit of one response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Clears a terminal and moves to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Shows the credentials in awsvid's cache: roles, expiry, next refresh, callers, last errors
///
/// Prints a table on a terminal, and JSON elsewhere. The fields are in deploy/docs/cli.md. None of
/// them is secret. Only root can open the socket, so the command needs sudo.
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 if awsvid answered, 1 if not.")]
pub struct StatusCommand {
    #[command(flatten)]
    config: ConfigFile,
    /// Path of awsvid's status socket, instead of the configuration's
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Form of the output [default: table on a terminal, else json]
    #[arg(short, long, value_enum)]
    output: Option<OutputFormat>,
    /// Repeats the output every two seconds, or every SECONDS, until it is interrupted. JSON is one
    /// line each time
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
}

impl StatusCommand {
    /// Prints the status, once or repeatedly.
    #[expect(
        clippy::print_stderr,
        reason = "errors of this command go to standard error"
    )]
    #[expect(
        clippy::disallowed_methods,
        reason = "between two displays nothing else runs"
    )]
    pub fn run(&self) -> ExitStatus {
        let terminal = io::stdout().is_terminal();
        let style = TerminalStyle::new(terminal, |name| std::env::var(name).ok());
        let json = match self.output {
            Some(output) => output == OutputFormat::Json,
            None => !terminal,
        };
        loop {
            let fetched = local_client::block_on(self.fetch());
            let fetched = fetched.unwrap_or_else(|error| Err(error.into()));
            let shown = fetched.and_then(|status| Ok(self.show(&status, json, style)?));
            match (shown, self.watch) {
                (Ok(StatusView::Printed), None) | (Ok(StatusView::ReaderGone), _) => {
                    return ExitStatus::Success;
                }
                (Err(error), None) => {
                    eprintln!("awsvid status: {error}");
                    return ExitStatus::Failure;
                }
                // The daemon may be back at the next attempt.
                (Err(error), Some(_)) => eprintln!("awsvid status: {error}"),
                (Ok(StatusView::Printed), Some(_)) => {}
            }
            thread::sleep(Duration::from_secs(self.watch.unwrap_or_default()));
        }
    }

    async fn fetch(&self) -> Result<Value, StatusSocketError> {
        let socket = self.config.status_socket(self.socket.as_deref())?;
        Ok(trusted_socket::get_status(&socket, RESPONSE_TIMEOUT).await?)
    }

    fn show(&self, status: &Value, json: bool, style: TerminalStyle) -> io::Result<StatusView> {
        let text = match (json, self.watch) {
            (true, None) => serde_json::to_string_pretty(status)? + "\n",
            (true, Some(_)) => format!("{status}\n"),
            (false, None) => table::render(status, Clock::system().now(), style),
            (false, Some(_)) => {
                format!(
                    "{CLEAR}{}",
                    table::render(status, Clock::system().now(), style)
                )
            }
        };
        match io::stdout()
            .write_all(text.as_bytes())
            .and_then(|()| io::stdout().flush())
        {
            Ok(()) => Ok(StatusView::Printed),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(StatusView::ReaderGone),
            Err(error) => Err(error),
        }
    }
}

enum StatusView {
    Printed,
    ReaderGone,
}
