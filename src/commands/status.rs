//! `awsvid status`: what the daemon holds and how its neighbours answer, over the status socket.

mod table;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use nix::unistd::geteuid;
use serde_json::Value;

use super::output::OutputFormat;
use super::style::Style;
use super::{ConfigFile, server};

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Ten thousand entries are some ten megabytes.
const ANSWER_MAX: usize = 256 * 1024 * 1024;
/// Clears a terminal and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Shows what awsvid holds: credentials with their roles, expiry, next refresh, callers and last errors.
///
/// On a terminal it is a table, elsewhere JSON; the fields are in deploy/README.md. Nothing in it is secret. The socket is
/// root's, so this needs sudo.
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0 if awsvid answered, 1 if not.")]
pub struct StatusCommand {
    #[command(flatten)]
    config: ConfigFile,
    /// awsvid's status socket, instead of what the configuration says.
    #[arg(long, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Form of the output [default: table on a terminal, else json].
    #[arg(short, long, value_enum)]
    output: Option<OutputFormat>,
    /// Shows it again every two seconds, or as often as is said, until it is interrupted. As JSON it is one line each time.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
}

impl StatusCommand {
    /// Shows it.
    #[expect(
        clippy::print_stderr,
        reason = "where a person looks for what went wrong"
    )]
    pub fn run(&self) -> ExitCode {
        let terminal = io::stdout().is_terminal();
        let style = Style::new(terminal, |name| std::env::var(name).ok());
        let json = match self.output {
            Some(output) => output == OutputFormat::Json,
            None => !terminal,
        };
        loop {
            let shown = self
                .ask()
                .and_then(|status| self.show(&status, json, style));
            match (shown, self.watch) {
                (Ok(StatusView::Yes), None) | (Ok(StatusView::NobodyLooks), _) => {
                    return ExitCode::SUCCESS;
                }
                (Err(error), None) => {
                    eprintln!("awsvid status: {error}");
                    return ExitCode::FAILURE;
                }
                // It may be back the next time.
                (Err(error), Some(_)) => eprintln!("awsvid status: {error}"),
                (Ok(StatusView::Yes), Some(_)) => {}
            }
            thread::sleep(Duration::from_secs(self.watch.unwrap_or_default()));
        }
    }

    fn ask(&self) -> Result<Value, String> {
        let socket = self.config.status_socket(self.socket.as_deref())?;
        let owners = [0, geteuid().as_raw()];
        let answer = server::get(
            &socket,
            &owners,
            "/status",
            ANSWER_MAX,
            Instant::now() + PATIENCE,
        )?;
        let status = serde_json::from_slice(&answer.body)
            .ok()
            .filter(|_| answer.status == 200);
        status.ok_or_else(|| not_awsvids(&socket, answer.status))
    }

    fn show(&self, status: &Value, json: bool, style: Style) -> Result<StatusView, String> {
        let text = match (json, self.watch) {
            (true, None) => {
                serde_json::to_string_pretty(status).map_err(|error| error.to_string())? + "\n"
            }
            (true, Some(_)) => format!("{status}\n"),
            (false, None) => table::render(status, SystemTime::now(), style),
            (false, Some(_)) => {
                format!("{CLEAR}{}", table::render(status, SystemTime::now(), style))
            }
        };
        match io::stdout()
            .write_all(text.as_bytes())
            .and_then(|()| io::stdout().flush())
        {
            Ok(()) => Ok(StatusView::Yes),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(StatusView::NobodyLooks),
            Err(error) => Err(error.to_string()),
        }
    }
}

enum StatusView {
    Yes,
    NobodyLooks,
}

fn not_awsvids(socket: &Path, status: u16) -> String {
    format!(
        "{}: status {status} and no answer of awsvid's; is it the socket of [listen] `status`?",
        socket.display()
    )
}
