//! The `awsvid` command.

use std::path::PathBuf;
use std::process::ExitCode;

use awsvid::commands::credential_process::CredentialProcess;
use awsvid::commands::exec::Exec;
use awsvid::commands::{check, trust_policy};
use awsvid::{dev, serve};
use clap::{Parser, Subcommand};

/// Gives each workload on this machine its own AWS credentials, by its SPIFFE identity.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the daemon.
    Serve {
        /// The configuration file.
        #[arg(long, env = "AWSVID_CONFIG", default_value = "/etc/awsvid/awsvid.toml")]
        config: PathBuf,
    },
    /// Walks the whole path, from the kernel to STS, and says what is wrong where, and what mends it.
    Check(check::Options),
    /// Writes what IAM needs to trust this node's roles: the OIDC provider and each role's trust policy.
    TrustPolicy(trust_policy::Options),
    Exec(Exec),
    CredentialProcess(CredentialProcess),
    /// Tries the whole path on this machine: no AWS account and no SPIRE needed.
    Dev {
        /// A command to run with the credentials endpoint in its environment; without one, `dev` prints the variables.
        #[arg(last = true)]
        command: Vec<std::ffi::OsString>,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve { config } => serve::serve(&config),
        Command::Check(options) => check::run(&options),
        Command::TrustPolicy(options) => trust_policy::run(&options),
        Command::Exec(exec) => exec.run(),
        Command::CredentialProcess(process) => process.run(),
        Command::Dev { command } => dev::run(&command),
    }
}
