//! `awsvid check`: tries each step from the kernel to STS, and reports each finding with a fix.
//!
//! It changes nothing, so it is safe while the daemon runs. A role that it assumes appears in
//! CloudTrail like any other. For a running workload it assumes one only with `--exchange`.

mod agent;
mod certificate;
mod daemon;
mod exchange;
mod host;
mod issuer;
mod report;
mod roles;
mod target;
mod workload;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::https_probe::{HttpProbe, Resolve};
use super::node;
use super::output::OutputFormat;
use crate::accounts::Nss;
use crate::cgroup::PodUid;
use crate::clock::Clock;
use crate::config::{Config, Exposure, is_aws_sts};
use crate::exit_status::ExitStatus;
use crate::role::{FirstExchange, Role};
use crate::roles_anywhere::RolesAnywhere;
use crate::sts::{BlockingCalls, NetworkSettings, Settings, Sts};
use agent::TokenSource;
#[cfg(any(test, fuzzing))]
pub(super) use issuer::fuzzing;
use report::CheckReport;
use target::CheckTarget;

const ARGUMENTS: &str = "arguments";
/// Fix of a setting with which a server cannot be called.
const STEP_FIX: &str = "correct [sts], or the environment variable";
/// Time limit of each document. STS itself does not wait longer.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(8);

/// Tries each step from the kernel to STS, and reports each problem with its fix
///
/// The steps are those of the daemon at a workload's first request: kernel and privileges, the
/// agent, a token for each role, the issuer's documents and keys, the exchange at STS. Run it as
/// the daemon runs, as root. It changes nothing, is safe while the daemon runs, and shows no
/// secret. A role that it assumes appears in CloudTrail like any other.
///
/// With --pid or --pod it reports which identities a running workload has, and which roles cover
/// them. It assumes no role then, unless --exchange is given too.
///
/// With --workload it checks the environment of one workload instead: variables, profiles and
/// proxies that take precedence over awsvid. Then it requests credentials from awsvid.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sudo awsvid check
  sudo awsvid check --pid 4711       a workload's identities and roles, if SPIRE
                                     attests it
  sudo awsvid check --resolve oidc.example.org:443:203.0.113.7
                                     the issuer, as seen from outside
  sudo -u billing awsvid check --workload
                                     the environment of that user

Exit status: 0 if all checks passed, 1 if a step failed, 2 if none failed but
some could not be checked. Each failure is printed with its fix.")]
pub struct CheckArgs {
    /// Path of the daemon's configuration file [default: /etc/awsvid/awsvid.toml]
    #[arg(
        long,
        env = "AWSVID_CONFIG",
        value_name = "FILE",
        default_value = "/etc/awsvid/awsvid.toml",
        hide_default_value = true
    )]
    config: PathBuf,
    /// Form of the report: lines, or one JSON document [default: table]
    #[arg(
        short,
        long,
        value_enum,
        default_value = "table",
        hide_default_value = true
    )]
    output: OutputFormat,
    /// Checks only the environment of this process, as a workload's. Run it as the workload
    #[arg(long)]
    workload: bool,
    /// PID of a running workload, where the agent attests callers: reports its identities and
    /// roles. Without it, the tokens are those of awsvid itself
    #[arg(long, value_name = "PID", group = "attested")]
    pid: Option<u32>,
    /// UID of a pod on this node (`metadata.uid`), likewise
    #[arg(long, value_name = "UID", group = "attested", value_parser = pod)]
    pod: Option<PodUid>,
    /// Also assumes each role that covers the workload of --pid or --pod
    #[arg(long, requires = "attested")]
    exchange: bool,
    /// Connects to ADDRESS for the issuer's documents, as a client outside would (like curl's
    /// --resolve)
    #[arg(long, value_name = "HOST:PORT:ADDRESS")]
    resolve: Vec<String>,
    /// Fetches the issuer's documents below this URL instead
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

fn pod(text: &str) -> Result<PodUid, &'static str> {
    PodUid::parse(text)
        .ok_or("not the UID of a pod; get it by kubectl get pod NAME -o jsonpath={.metadata.uid}")
}

impl CheckArgs {
    fn target(&self) -> CheckTarget {
        match (&self.pod, self.pid) {
            (Some(uid), _) => CheckTarget::Pod(uid.clone()),
            (None, Some(pid)) => CheckTarget::Process(pid),
            (None, None) => CheckTarget::Itself,
        }
    }
}

/// Runs all checks. Exit status: 0 if all passed, 1 if a step failed, 2 if none failed but some
/// could not be checked.
pub fn run(options: &CheckArgs) -> ExitStatus {
    let mut report = CheckReport::new(options.output == OutputFormat::Json);
    match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
    {
        Ok(runtime) => {
            match options.workload {
                true => runtime.block_on(workload::check(
                    &|name| std::env::var(name).ok(),
                    &mut report,
                )),
                false => runtime.block_on(run_steps(options, &mut report)),
            }
            // Does not wait for blocked threads, such as the lookup of a name.
            runtime.shutdown_background();
        }
        Err(error) => report.unchecked("machine", error.to_string()),
    }
    report.end()
}

async fn run_steps(options: &CheckArgs, report: &mut CheckReport) {
    let Some(config) = configuration(options, report) else {
        return;
    };
    let resolve: Result<Vec<Resolve>, _> =
        options.resolve.iter().map(|text| text.parse()).collect();
    let resolve = match resolve {
        Ok(resolve) => resolve,
        Err(form) => return report.unchecked(ARGUMENTS, format!("--resolve: {form}")),
    };
    let proc = Path::new("/proc");
    host::check(
        &config,
        proc,
        &host::KernelSupport::tried(&config, proc),
        report,
    );
    daemon::check(&config, report).await;
    let (network, sts) = sts(&config);
    if let Err(error) = sts.prepare(&config.roles.sts_targets()).await {
        return report.failed("sts", error.to_string(), STEP_FIX);
    }
    let anywhere_ca = config.roles_anywhere.ca_file.clone();
    let anywhere = RolesAnywhere::new(settings(&config, anywhere_ca, &network), Clock::system());
    let targets = config.roles.roles_anywhere_targets();
    if let Err(error) = anywhere.prepare(&targets).await {
        let fix = "correct [roles_anywhere], or the environment variable";
        return report.failed("sts", error.to_string(), fix);
    }
    let web = HttpProbe {
        resolve,
        network: Some(network),
        deadline: DOCUMENT_TIMEOUT,
    };
    let source = agent::connect(&config, options.target(), report).await;
    // These need no token, so they also show whether STS can be reached.
    clocks(&config, &sts, &web, report).await;
    let Some(source) = source else {
        return report_skipped(&config, report);
    };
    let roles = match &source {
        TokenSource::Agent(agent, target) if target.is_workload() => {
            let covering = roles::check(&config, agent.as_ref(), target, report).await;
            if !options.exchange {
                return roles::report_not_assumed(&covering, report);
            }
            covering
        }
        _ => config.roles.defined.clone(),
    };
    let clients = (&anywhere, &sts);
    try_roles(options, &config, &source, (&roles, clients), &web, report).await;
    if config.roles.defined.is_empty() {
        report
            .unchecked("sts", "workloads name their roles themselves ([requested_roles] allow), so there is none to try");
    }
}

/// Fetches a token or certificate for each of these roles, and assumes the role with it.
async fn try_roles(
    options: &CheckArgs,
    config: &Config,
    source: &TokenSource,
    (roles, clients): (&[Arc<Role>], (&RolesAnywhere, &Sts)),
    web: &HttpProbe,
    report: &mut CheckReport,
) {
    let mut issuers: BTreeSet<Option<String>> = BTreeSet::new();
    for role in roles {
        if let Some(at) = role.exchange.roles_anywhere() {
            certificate::check(config, source, clients, (role, at), web, report).await;
        }
        if !role.exchange.uses_jwt() {
            continue;
        }
        let Some(token) = agent::token(config, source, role, report).await else {
            continue;
        };
        // The issuer and its keys are the same for each audience.
        if issuers.insert(token.issuer()) {
            let aws = is_aws_sts(role.sts.endpoint.as_deref());
            issuer::check(&token, options.url.as_deref(), aws, web, report).await;
        }
        exchange::exchange(clients.1, role, &token, report).await;
    }
}

/// Compares this node's clock with that of each STS.
async fn clocks(config: &Config, sts: &Sts, web: &HttpProbe, report: &mut CheckReport) {
    for target in config.roles.sts_targets() {
        exchange::clock(sts, target, web, report).await;
    }
}

/// Reports the steps that need a token or a certificate of the agent.
fn report_skipped(config: &Config, report: &mut CheckReport) {
    let roles = &config.roles.defined;
    let mut steps = vec![agent::IDENTITY];
    if roles.iter().any(|role| role.exchange.uses_jwt()) {
        steps.extend([issuer::TOKEN, issuer::DISCOVERY, issuer::KEYS]);
    }
    let by_certificate = |exchange: &FirstExchange| exchange.roles_anywhere().is_some();
    if roles.iter().any(|role| by_certificate(&role.exchange)) {
        steps.push(certificate::CERTIFICATE);
    }
    steps.push(exchange::STEP);
    for step in steps {
        report.unchecked(step, "skipped: it needs an answer of the agent");
    }
}

fn configuration(options: &CheckArgs, report: &mut CheckReport) -> Option<Config> {
    const STEP: &str = "config";
    match Config::load(&options.config, Exposure::of_command(), |name| {
        std::env::var(name).ok()
    }) {
        Ok(loaded) => {
            report.ok(STEP, format!("{} has no errors", options.config.display()));
            for warning in loaded
                .warnings
                .iter()
                .chain(&node::warnings(&loaded.config, &Nss))
            {
                let location = warning.location(&options.config);
                let saw = format!("{location}: warning: {}", warning.cause());
                report.info(STEP, saw, &warning.fix);
            }
            Some(loaded.config)
        }
        Err(errors) => {
            report.failed(
                STEP,
                errors.to_string(),
                format!(
                    "correct {0}; awsvid config validate {0} reports the same",
                    options.config.display()
                ),
            );
            None
        }
    }
}

/// Builds the daemon's STS client, and its network settings, which other steps use too.
fn sts(config: &Config) -> (NetworkSettings, Sts) {
    let network = NetworkSettings::from_env(|name| std::env::var(name).ok());
    let settings = settings(config, config.sts.ca_file.clone(), &network);
    (network, Sts::new(settings, Clock::system()))
}

fn settings(config: &Config, ca_file: Option<PathBuf>, network: &NetworkSettings) -> Settings {
    Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file,
        network: network.clone(),
        blocking: BlockingCalls::default(),
    }
}

#[cfg(test)]
mod doc_tables;
#[cfg(test)]
mod tests;
