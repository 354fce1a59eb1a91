//! `awsvid config`: what a configuration comes to, and what is wrong with one, without a daemon.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::{ConfigFile, node};
use crate::accounts::Nss;
use crate::config::{Config, ConfigErrors, Exposure, Loaded};

/// sysexits.h, as `awsvid serve` ends with it: something was found in a misconfigured state.
const EX_CONFIG: u8 = 78;
/// Names standard input instead of a file.
const STDIN: &str = "-";

/// Checks or explains a configuration file.
///
/// Nothing is started and no agent is called. With --check it also examines this machine: its users and groups, the files that
/// are named, and the owner and mode of the configuration. --offline leaves that out, for another machine than the one that the
/// file is for.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  awsvid config --check awsvid.toml && sudo install -m 0644 awsvid.toml /etc/awsvid/
  awsvid config --offline --check - <awsvid.toml              in CI, before it is anywhere
  /usr/bin/awsvid.previous config --offline --check - </etc/awsvid/awsvid.toml
                                                              before that version is installed again
  awsvid config --explain | grep -v '# default'

Exit status: 0, or 78 if the file has mistakes. Each is one line on standard error: file:line: key: what; what to do. Warnings
are lines of the same form, with \"warning:\" before the key, and do not change the status.")]
#[group(skip)]
pub struct ConfigArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// Prints all that is in effect, as a file would say it: every key, with what is a default, and where else a value comes
    /// from. Variables are those of this command: the daemon may have others.
    #[arg(long, required_unless_present = "check")]
    explain: bool,
    /// Reports every mistake in this file, each with its line and what to do, and warnings. `-` is standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "explain")]
    check: Option<PathBuf>,
    /// Checks the text alone, and nothing of this machine.
    #[arg(long, requires = "check", conflicts_with = "explain")]
    offline: bool,
}

impl ConfigArgs {
    /// Checks it, and prints it if that is wanted.
    pub fn run(&self) -> ExitCode {
        let env = |name: &str| std::env::var(name).ok();
        match &self.check {
            Some(path) => check(path, self.offline, env).unwrap_or_else(|status| status),
            None => explain(self.config.path(), env).unwrap_or_else(|status| status),
        }
    }
}

fn check(
    path: &Path,
    offline: bool,
    env: impl Fn(&str) -> Option<String>,
) -> Result<ExitCode, ExitCode> {
    let loaded = match (path.as_os_str() == STDIN, offline) {
        (true, _) => read_stdin(path, &env),
        (false, true) => Config::load(path, Exposure::Ignored, env),
        (false, false) => Config::load(path, Exposure::of_command(), env),
    };
    let loaded = loaded.and_then(|loaded| {
        if offline {
            Ok(loaded)
        } else {
            with_files_of_node(path, loaded)
        }
    });
    report(path, loaded)?;
    Ok(print(&format!("{}: no mistakes\n", path.display())))
}

/// Adds what this node says of it. For root a file that the daemon would not use is an error, as the configuration itself is.
fn with_files_of_node(path: &Path, mut loaded: Loaded) -> Result<Loaded, ConfigErrors> {
    let exposed = node::exposed(&loaded.config);
    if Exposure::of_command() == Exposure::Refused && !exposed.is_empty() {
        return Err(ConfigErrors {
            path: path.to_owned(),
            problems: exposed,
        });
    }
    loaded.warnings.extend(exposed);
    loaded.warnings.extend(node::warnings(&loaded.config, &Nss));
    loaded
        .warnings
        .sort_by_key(|warning| warning.line.unwrap_or(usize::MAX));
    Ok(loaded)
}

fn read_stdin(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, ConfigErrors> {
    let mut bytes = Vec::new();
    let read = io::stdin()
        .read_to_end(&mut bytes)
        .map_err(|error| vec![Config::unreadable(&error)]);
    let loaded = read.and_then(|_| Config::parse_bytes(bytes, env));
    loaded.map_err(|problems| ConfigErrors {
        path: path.to_owned(),
        problems,
    })
}

fn explain(path: &Path, env: impl Fn(&str) -> Option<String>) -> Result<ExitCode, ExitCode> {
    let Loaded { config, .. } = report(path, Config::load(path, Exposure::Warned, &env))?;
    // Read once more for which keys are in it. If it has changed in this moment, only the origins are those of the new one.
    let text = std::fs::read_to_string(path).unwrap_or_default();
    Ok(print(&format!(
        "# {}, and what it leaves out\n{}",
        path.display(),
        config.explain(&text, &env)
    )))
}

/// The configuration; what is wrong or unwise about it is on standard error.
#[expect(clippy::print_stderr, reason = "this is what the command is for")]
fn report(path: &Path, loaded: Result<Loaded, ConfigErrors>) -> Result<Loaded, ExitCode> {
    match loaded {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                let line = warning
                    .line
                    .map_or(String::new(), |line| format!("{line}:"));
                eprintln!("{}:{line} warning: {warning}", path.display());
            }
            Ok(loaded)
        }
        Err(errors) => {
            eprintln!("{errors}");
            Err(ExitCode::from(EX_CONFIG))
        }
    }
}

/// A reader that stops early is not an error.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
