//! `awsvid config`: validates a configuration, or shows the effective one, without a daemon.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::{ConfigFile, node};
use crate::accounts::Nss;
use crate::config::{
    Config, ConfigErrors, Exposure, FIRST_UNPRIVILEGED_PORT, LoadedConfig, Problem,
};
use crate::exit_status::ExitStatus;

/// The name of standard input.
const STDIN: &str = "-";

/// Validates a configuration file, or shows the effective configuration
///
/// Nothing is started and no agent is called.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  awsvid config validate awsvid.toml
  awsvid config show | grep -v '# default'

Exit status: 0, 78 if the file has mistakes, 1 if the output cannot be written.")]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    Validate(ValidateArgs),
    Show(ShowArgs),
}

/// Reports every mistake of a configuration file, each with its line and its fix
///
/// It also examines this node: users and groups, the named files and sockets, and the owner and
/// mode of the configuration.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  awsvid config validate awsvid.toml
  awsvid config validate - --offline <awsvid.toml       in CI

Each mistake is one line on standard error: `file:line: key: mistake; fix`.
A warning has `warning:` before the key, and does not change the status.

Exit status: 0, 78 if the file has mistakes, 1 if the output cannot be written.")]
struct ValidateArgs {
    /// The file, or `-` for standard input [default: the file of --config]
    #[arg(value_name = "FILE|-")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
    /// Validates the text alone, without facts of this node.
    #[arg(long)]
    offline: bool,
}

/// Prints the effective configuration as a file
///
/// It has every key, and marks each default and each value that comes from elsewhere. The
/// environment is that of this command. The daemon may have another.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  awsvid config show
  awsvid config show --config awsvid.toml | grep -v '# default'

Exit status: 0, 78 if the file has mistakes, 1 if the output cannot be written.")]
struct ShowArgs {
    #[command(flatten)]
    config: ConfigFile,
}

impl ConfigArgs {
    /// Runs the subcommand, and returns the exit status.
    pub fn run(&self) -> ExitStatus {
        let env = |name: &str| std::env::var(name).ok();
        let status = match &self.command {
            ConfigCommand::Validate(args) => {
                let path = args.file.as_deref().unwrap_or(args.config.path());
                validate(path, args.offline, env)
            }
            ConfigCommand::Show(args) => show(args.config.path(), env),
        };
        status.unwrap_or_else(|status| status)
    }
}

fn validate(
    path: &Path,
    offline: bool,
    env: impl Fn(&str) -> Option<String>,
) -> Result<ExitStatus, ExitStatus> {
    let loaded = match (path.as_os_str() == STDIN, offline) {
        (true, _) => read_stdin(path, &env),
        (false, true) => Config::load(path, Exposure::Ignored, env),
        (false, false) => Config::load(path, Exposure::of_command(), env),
    };
    let loaded = loaded.and_then(|mut loaded| {
        if offline {
            let ports = loaded.config.unprivileged_ports(FIRST_UNPRIVILEGED_PORT);
            loaded.warnings.extend(ports);
            sort(&mut loaded.warnings);
            Ok(loaded)
        } else {
            with_files_of_node(path, loaded)
        }
    });
    report(path, loaded)?;
    Ok(print(&format!("{}: no mistakes\n", path.display())))
}

/// Adds warnings about this node. For root, a file that the daemon would not use is an error.
fn with_files_of_node(path: &Path, mut loaded: LoadedConfig) -> Result<LoadedConfig, ConfigErrors> {
    let exposed = node::exposed(&loaded.config);
    if Exposure::of_command() == Exposure::Rejected && !exposed.is_empty() {
        return Err(ConfigErrors {
            path: path.to_owned(),
            problems: exposed,
        });
    }
    loaded.warnings.extend(exposed);
    loaded.warnings.extend(node::warnings(&loaded.config, &Nss));
    loaded
        .warnings
        .extend(node::missing_sockets(&loaded.config));
    sort(&mut loaded.warnings);
    Ok(loaded)
}

fn sort(warnings: &mut [Problem]) {
    warnings.sort_by(Problem::by_line);
}

fn read_stdin(
    path: &Path,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<LoadedConfig, ConfigErrors> {
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

fn show(path: &Path, env: impl Fn(&str) -> Option<String>) -> Result<ExitStatus, ExitStatus> {
    let loaded = report(path, Config::load(path, Exposure::Warned, &env))?;
    Ok(print(&format!(
        "# {}, with all defaults\n{}",
        path.display(),
        loaded.show(&env)
    )))
}

/// Returns the configuration, after it has written errors or warnings to standard error.
#[expect(clippy::print_stderr, reason = "this is what the command is for")]
fn report(
    path: &Path,
    loaded: Result<LoadedConfig, ConfigErrors>,
) -> Result<LoadedConfig, ExitStatus> {
    match loaded {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                eprintln!("{}: warning: {warning}", warning.location(path));
            }
            Ok(loaded)
        }
        Err(errors) => {
            eprintln!("{errors}");
            Err(ExitStatus::Config)
        }
    }
}

/// Writes to standard output. A reader that stops early is not an error.
fn print(text: &str) -> ExitStatus {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitStatus::Success,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitStatus::Success,
        Err(_) => ExitStatus::Failure,
    }
}
