//! `awsvid config`: what a configuration comes to, and what is wrong with one, without a daemon.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::ConfigFile;
use crate::config::{Config, Loaded};

/// sysexits.h, as `awsvid serve` ends with it: something was found in a misconfigured state.
const EX_CONFIG: u8 = 78;

/// Checks or explains a configuration file.
///
/// Nothing is started and nobody is asked but this machine's user database.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  awsvid config --check awsvid.toml && sudo install -m 0644 awsvid.toml /etc/awsvid/
  awsvid config --explain | grep -v '# default'

Exit status: 0, or 78 if the file has mistakes. Each is one line on standard error: file:line: key: what; what to do.")]
#[group(skip)]
pub struct Configuration {
    #[command(flatten)]
    config: ConfigFile,
    /// Prints all that is in effect, as a file would say it: every key, with what is a default, and where else a value comes
    /// from. Variables are those of this command: the daemon may have others.
    #[arg(long, required_unless_present = "check")]
    explain: bool,
    /// Reports every mistake in this file, each with its line and what to do, and warnings.
    #[arg(long, value_name = "FILE", conflicts_with = "explain")]
    check: Option<PathBuf>,
}

impl Configuration {
    /// Checks it, and prints it if that is wanted.
    pub fn run(&self) -> ExitCode {
        let env = |name: &str| std::env::var(name).ok();
        match &self.check {
            Some(path) => {
                load(path, env).map_or_else(|status| status, |_| said(&format!("{}: no mistakes\n", path.display())))
            }
            None => explain(self.config.path(), env).unwrap_or_else(|status| status),
        }
    }
}

fn explain(path: &Path, env: impl Fn(&str) -> Option<String>) -> Result<ExitCode, ExitCode> {
    let Loaded { config, .. } = load(path, &env)?;
    // Read once more for which keys are in it. If it has changed in this moment, only the origins are those of the new one.
    let text = std::fs::read_to_string(path).unwrap_or_default();
    Ok(said(&format!("# {}, and what it leaves out\n{}", path.display(), config.explain(&text, &env))))
}

/// The configuration; what is wrong or unwise about it is on standard error.
#[expect(clippy::print_stderr, reason = "this is what the command is for")]
fn load(path: &Path, env: impl Fn(&str) -> Option<String>) -> Result<Loaded, ExitCode> {
    match Config::load(path, env) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                let line = warning.line.map_or(String::new(), |line| format!("{line}:"));
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

/// Prints it; whoever has stopped reading has had enough.
fn said(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
