//! The entry point of `awsvid`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use awsvid::commands::config::ConfigArgs;
use awsvid::commands::credential_process::CredentialProcess;
use awsvid::commands::exec::Exec;
use awsvid::commands::probe::Probe;
use awsvid::commands::status::StatusCommand;
use awsvid::commands::{check, trust_policy};
use awsvid::daemon;
#[cfg(feature = "dev")]
use awsvid::dev;
use awsvid::exit_status::ExitStatus;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

/// Gives each workload on this machine its own AWS credentials, by its SPIFFE ID
///
/// awsvid is one daemon per node. AWS SDKs and the AWS CLI fetch credentials from it over the
/// container credential endpoint, which all of them support. awsvid learns from the kernel which
/// workload is calling, fetches that workload's JWT-SVID from SPIRE or another SPIFFE provider, and
/// exchanges it at AWS STS.
#[cfg_attr(
    feature = "dev",
    doc = "",
    doc = "To start: `awsvid dev` runs all of it on this machine, without an AWS account and without SPIRE."
)]
#[derive(Parser)]
#[command(version, long_version = long_version(), after_help = after_help())]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Returns the end of the help. A build without `dev` does not name that command.
fn after_help() -> String {
    let dev = match cfg!(feature = "dev") {
        true => "  on any machine, to try awsvid    dev\n",
        false => "",
    };
    format!(
        "\
Where to use them:
{dev}  on a node                        serve, config, status, probe, check
  for an AWS account               trust-policy
  in a workload                    exec, credential-process

The configuration is /etc/awsvid/awsvid.toml. AWSVID_CONFIG or --config names
another file.
Output is coloured only on a terminal, and never if NO_COLOR is set."
    )
}

#[derive(Subcommand)]
enum Command {
    /// Runs the daemon
    ///
    /// The daemon runs until SIGTERM or SIGINT, and then finishes open requests. SIGHUP reloads the
    /// configuration. It needs root, or the capabilities of deploy/systemd/awsvid.service.
    #[command(after_help = "\
Exit status: 0 after a signal, 130 or 143 after a second one with requests still
open, 78 if the configuration has errors, 2 for an unknown argument, 1 if the
daemon cannot start for another reason.

Errors of the configuration are on standard error, each with its line and a fix.

Validate a configuration before the start: awsvid config validate FILE")]
    Serve {
        /// Path of the daemon's configuration file [default: /etc/awsvid/awsvid.toml]
        #[arg(
            long,
            env = "AWSVID_CONFIG",
            value_name = "FILE",
            default_value = "/etc/awsvid/awsvid.toml",
            hide_default_value = true
        )]
        config: PathBuf,
        /// Reloads the configuration when its files change, as SIGHUP does
        #[arg(long)]
        watch: bool,
    },
    Config(ConfigArgs),
    Status(StatusCommand),
    Probe(Probe),
    Check(check::CheckArgs),
    TrustPolicy(trust_policy::TrustPolicyArgs),
    Exec(Exec),
    CredentialProcess(CredentialProcess),
    /// Tries awsvid on this machine, without an AWS account and without SPIRE
    ///
    /// Starts the daemon between a small SPIFFE provider and an STS of its own, all on loopback.
    /// Both really sign and verify, but AWS does not know the credentials.
    #[command(after_help = "\
Examples:
  awsvid dev                                  prints variables to copy elsewhere
  awsvid dev -- aws sts get-caller-identity   runs one command with them

Exit status: that of the command, 128 plus the number of a signal that ended it,
127 if it does not exist, 126 if it cannot be run. Without a command 0. 1 if
awsvid dev itself cannot start.")]
    #[cfg(feature = "dev")]
    Dev {
        /// Command to run with the endpoint in its environment. Without one, `dev` prints the
        /// variables
        #[arg(last = true, value_name = "CMD")]
        command: Vec<std::ffi::OsString>,
    },
    /// Prints a shell's completion script for awsvid
    #[command(after_help = "\
Examples:
  awsvid completions bash > ~/.local/share/bash-completion/completions/awsvid
  awsvid completions zsh > ~/.zfunc/_awsvid
  awsvid completions fish > ~/.config/fish/completions/awsvid.fish

Exit status: 0, or 1 if the script cannot be written.")]
    Completions {
        /// Shell to print the script for
        shell: Shell,
    },
    /// Prints a manual page: of awsvid, of one of its commands, or of its configuration file.
    #[command(after_help = "\
Examples:
  awsvid man | man -l -
  awsvid man exec > awsvid-exec.1
  awsvid man config validate > awsvid-config-validate.1
  awsvid man awsvid.toml > awsvid.toml.5
  sudo awsvid man --directory /usr/share/man/man1       all pages

Exit status: 0, or 1 if a page cannot be written.")]
    Man {
        /// A command, or `awsvid.toml` for the configuration file.
        #[arg(value_name = "COMMAND|awsvid.toml")]
        command: Vec<String>,
        /// Writes all pages into this directory, which it creates if necessary. The page of
        /// `awsvid.toml` goes into the directory `man5` next to it, if its name is `man1`.
        #[arg(long, value_name = "DIR", conflicts_with = "command")]
        directory: Option<PathBuf>,
    },
}

fn main() -> ExitStatus {
    let matches = Arguments::command().get_matches();
    let name = matches.subcommand_name().unwrap_or_default();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let status = run(arguments.command);
    debug_assert!(status.is_of(name), "awsvid {name} ends with {status:?}");
    status
}

fn run(command: Command) -> ExitStatus {
    match command {
        Command::Serve { config, watch } => daemon::serve(&config, watch),
        Command::Config(configuration) => configuration.run(),
        Command::Status(status) => status.run(),
        Command::Probe(probe) => probe.run(),
        Command::Check(options) => check::run(&options),
        Command::TrustPolicy(options) => trust_policy::run(&options),
        Command::Exec(exec) => exec.run(),
        Command::CredentialProcess(process) => process.run(),
        #[cfg(feature = "dev")]
        Command::Dev { command } => dev::run(&command),
        Command::Completions { shell } => completions(shell),
        Command::Man {
            directory: Some(directory),
            ..
        } => pages(&directory),
        Command::Man {
            command,
            directory: None,
        } => man(&command),
    }
}

/// Returns the facts of this build. The revision is set by proto/build.rs.
fn long_version() -> String {
    let libc = if cfg!(target_env = "musl") {
        "musl"
    } else {
        "gnu"
    };
    let linkage = match cfg!(target_feature = "crt-static") {
        true => " (static)",
        false => "",
    };
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    let dev = if cfg!(feature = "dev") { " dev" } else { "" };
    format!(
        "{}\nrevision: {}\ntarget:   {}-{}-{libc}{linkage}\nprofile:  {profile}\nfeatures: workload-api spire-delegated spiffe-broker{dev}",
        env!("CARGO_PKG_VERSION"),
        option_env!("AWSVID_REVISION")
            .unwrap_or("not recorded (a debug build, or one without git)"),
        std::env::consts::ARCH,
        std::env::consts::OS,
    )
}

fn completions(shell: Shell) -> ExitStatus {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "awsvid", &mut script);
    print(&script)
}

/// The name of the configuration's manual page, of section 5.
const CONFIGURATION_PAGE: &str = "awsvid.toml";

/// Prints a page made from the definitions above, so that it agrees with `--help`.
fn man(names: &[String]) -> ExitStatus {
    if names == [CONFIGURATION_PAGE] {
        return print(awsvid::config::manual_page().as_bytes());
    }
    let mut command = defined();
    for name in names {
        command = match command.find_subcommand(name) {
            Some(found) => found.clone(),
            None => command
                .error(
                    ErrorKind::InvalidValue,
                    format!("the command {name:?} does not exist"),
                )
                .exit(),
        };
    }
    page(command).map_or(ExitStatus::Failure, |page| print(&page))
}

/// Writes all pages, in files with the names that man(1) expects.
#[expect(clippy::print_stderr, reason = "a command that a person runs")]
fn pages(directory: &Path) -> ExitStatus {
    let written = fs::create_dir_all(directory)
        .and_then(|()| write_pages(directory, &defined()))
        .and_then(|()| write_configuration_page(directory));
    match written {
        Ok(()) => ExitStatus::Success,
        Err(error) => {
            eprintln!("awsvid man: {}: {error}", directory.display());
            ExitStatus::Failure
        }
    }
}

fn write_pages(directory: &Path, command: &clap::Command) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or("awsvid");
    fs::write(directory.join(format!("{name}.1")), page(command.clone())?)?;
    subcommands(command).try_for_each(|command| write_pages(directory, command))
}

/// Writes the page of the configuration file. man(1) finds section 5 only in a directory `man5`.
fn write_configuration_page(directory: &Path) -> io::Result<()> {
    let directory = match directory.ends_with("man1") {
        true => directory.with_file_name("man5"),
        false => directory.to_owned(),
    };
    fs::create_dir_all(&directory)?;
    let page = awsvid::config::manual_page();
    fs::write(directory.join(format!("{CONFIGURATION_PAGE}.5")), page)
}

fn subcommands(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    command
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
}

/// Returns the command with the whole names of its subcommands, as in awsvid-exec(1).
fn defined() -> clap::Command {
    let mut command = Arguments::command();
    command.build();
    command
}

/// Renders a page as roff. clap's synopsis leaves out the values of options, so it is replaced.
fn page(command: clap::Command) -> io::Result<Vec<u8>> {
    const HEADER: &str = ".SH SYNOPSIS\n";
    let synopsis = synopsis(&command);
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .source(concat!("awsvid ", env!("CARGO_PKG_VERSION")))
        .render(&mut page)?;
    // clap_mangen's heading of the help's last part, which has examples and exit statuses.
    let page = String::from_utf8(page)
        .map_err(io::Error::other)?
        .replace(".SH EXTRA\n", ".SH NOTES\n");
    let (before, rest) = page.split_once(HEADER).unwrap_or((&page, ""));
    let after = rest.find(".SH ").map_or("", |at| &rest[at..]);
    Ok(format!("{before}{HEADER}{synopsis}\n{after}").into_bytes())
}

/// Returns the command's line with every option and the names or words of its value.
fn synopsis(command: &clap::Command) -> String {
    let name = command.get_bin_name().unwrap_or("awsvid");
    let mut words = vec![format!("\\fB{}\\fR", name.replace('-', "\\-"))];
    let is_shown = |arg: &&clap::Arg| !matches!(arg.get_id().as_str(), "help" | "version");
    let (positional, options): (Vec<_>, Vec<_>) = command
        .get_arguments()
        .filter(is_shown)
        .partition(|arg| arg.is_positional());
    for arg in options.into_iter().chain(positional) {
        words.push(usage(arg));
    }
    if subcommands(command).next().is_some() {
        words.push("\\fICOMMAND\\fR".to_owned());
    }
    words.join(" ")
}

fn usage(arg: &clap::Arg) -> String {
    let literal = |text: &str| text.replace('-', "\\-");
    let known: Vec<String> = arg
        .get_possible_values()
        .iter()
        .map(|value| literal(value.get_name()))
        .collect();
    let names = arg.get_value_names().unwrap_or_default();
    let value = match known.is_empty() {
        true => format!("\\fI{}\\fR", literal(&names.join(" "))),
        false => format!("\\fB{}\\fR", known.join("|")),
    };
    let takes_value = arg.get_action().takes_values();
    let value_is_optional = arg
        .get_num_args()
        .is_some_and(|range| range.min_values() == 0);
    let mut text = match (arg.get_short(), arg.get_long()) {
        (Some(short), _) => format!("\\fB\\-{short}\\fR"),
        (None, Some(long)) => format!("\\fB\\-\\-{}\\fR", literal(long)),
        (None, None) if arg.is_last_set() => format!("\\-\\- {value}..."),
        (None, None) => value.clone(),
    };
    let is_repeated = arg
        .get_num_args()
        .is_some_and(|range| range.max_values() > 1);
    if !arg.is_positional() && takes_value {
        text = match value_is_optional {
            true => format!("{text} [{value}]"),
            false => format!("{text} {value}"),
        };
    }
    match (arg.is_required_set(), is_repeated && !arg.is_last_set()) {
        (true, _) => text,
        (false, true) => format!("[{text}]..."),
        (false, false) => format!("[{text}]"),
    }
}

/// Prints the text. A reader that stops early is not an error.
fn print(text: &[u8]) -> ExitStatus {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitStatus::Failure,
        _ => ExitStatus::Success,
    }
}
