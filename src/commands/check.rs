//! `awsvid check`: walks from the kernel to STS, and says at each step what it saw and what would mend it. It changes nothing,
//! so it is safe beside the running daemon; a role that it assumes shows up in CloudTrail like any other.

mod agent;
mod exchange;
mod issuer;
mod machine;
mod report;
mod workload;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::web::{Resolve, Web};
use crate::clock::Clock;
use crate::config::{Config, is_aws_sts};
use crate::role::StsTarget;
use crate::sts::{Network, Settings, Sts};
use report::Report;

/// For each document. STS itself waits no longer.
const DEADLINE: Duration = Duration::from_secs(8);

/// What is to be looked at, and from where.
#[derive(Debug, Args)]
pub struct Options {
    /// The configuration file.
    #[arg(long, env = "AWSVID_CONFIG", default_value = "/etc/awsvid/awsvid.toml")]
    config: PathBuf,
    /// One JSON document in place of lines.
    #[arg(long)]
    json: bool,
    /// Looks at the environment of this process as a workload's, and at nothing else: run it as the workload.
    #[arg(long)]
    workload: bool,
    /// A running workload, where the agent attests callers; without one, the tokens are those of awsvid itself.
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// Connects to this address for the issuer's documents, to see them as from outside (as curl's --resolve).
    #[arg(long, value_name = "HOST:PORT:ADDRESS")]
    resolve: Vec<String>,
    /// Looks for the issuer's documents below this URL instead.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

/// Walks; the exit status is 0 if all is well, 1 if a step failed, 2 if none did but some could not be looked at.
pub fn run(options: &Options) -> ExitCode {
    let mut report = Report::new(options.json);
    match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => {
            match options.workload {
                true => runtime.block_on(workload::check(&|name| std::env::var(name).ok(), &mut report)),
                false => runtime.block_on(walk(options, &mut report)),
            }
            // Without waiting for what still blocks a thread, such as the lookup of a name.
            runtime.shutdown_background();
        }
        Err(error) => report.unchecked("machine", error.to_string()),
    }
    report.end()
}

async fn walk(options: &Options, report: &mut Report) {
    let Some(config) = configuration(options, report) else { return };
    let resolve: Result<Vec<Resolve>, _> = options.resolve.iter().map(|text| text.parse()).collect();
    let resolve = match resolve {
        Ok(resolve) => resolve,
        Err(form) => return report.unchecked("arguments", format!("--resolve: {form}")),
    };
    let web = Web { resolve: &resolve, deadline: DEADLINE };
    machine::check(&config, report);
    let sts = match sts(&config) {
        Ok(sts) => sts,
        Err(error) => return report.failed("sts", error, "correct [sts], or the environment variable"),
    };
    let Some(asked) = agent::connect(&config, options.pid, report).await else {
        return report
            .unchecked("identity", "without the agent there are no tokens, and nothing after them to look at");
    };
    let (mut issuers, mut clocks): (BTreeSet<Option<String>>, Vec<StsTarget>) = Default::default();
    for role in &config.roles.defined {
        if !clocks.contains(&role.sts) {
            clocks.push(role.sts.clone());
            exchange::clock(role, &web, report).await;
        }
        let Some(live) = agent::token(&config, &asked, role, report).await else { continue };
        // Whatever the audience, the issuer and its keys are the same.
        if issuers.insert(live.issuer().map(str::to_owned)) {
            let aws = is_aws_sts(role.sts.endpoint.as_deref());
            issuer::check(&live, options.url.as_deref(), aws, &web, report).await;
        }
        exchange::exchange(&sts, role, &live, report).await;
    }
    if config.roles.defined.is_empty() {
        report
            .unchecked("sts", "workloads name their roles themselves (allow_requested_roles), so there is none to try");
    }
}

fn configuration(options: &Options, report: &mut Report) -> Option<Config> {
    const STEP: &str = "config";
    match Config::load(&options.config, |name| std::env::var(name).ok()) {
        Ok(loaded) => {
            report.pass(STEP, format!("{} has no errors", options.config.display()));
            for warning in &loaded.warnings {
                report.note(STEP, warning.to_string(), "it is allowed, and not wise");
            }
            Some(loaded.config)
        }
        Err(errors) => {
            report.failed(STEP, errors.to_string(), format!("correct {}", options.config.display()));
            None
        }
    }
}

/// As the daemon has it.
fn sts(config: &Config) -> Result<Sts, String> {
    let network = Network::from_env(|name| std::env::var(name).ok()).map_err(|error| error.to_string())?;
    let settings = Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file: config.sts.ca_file.clone(),
        network,
    };
    Sts::new(settings, Clock::system()).map_err(|error| error.to_string())
}
