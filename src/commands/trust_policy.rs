//! `awsvid trust-policy`: the IAM resources by which this node's workloads can assume their roles.
//!
//! The configuration has the roles and their SPIFFE IDs. A live token has the issuer.

mod anywhere;
mod aws_cli;
mod cloudformation;
mod error;
mod plan;
mod terraform;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::Value;

use super::https_probe::{HttpProbe, ServerChain};
use super::live_token::{self, NoLiveSvid};
use crate::clock::Clock;
use crate::config::{Config, Exposure};
use crate::exit_status::ExitStatus;
use crate::identity::SpiffeId;
use crate::sts::NetworkSettings;
use anywhere::PlannedAnywhere;
use error::TrustPolicyError;
#[cfg(any(test, fuzzing))]
pub(super) use plan::fuzzing;
use plan::{Plan, PlannedAccount, PlannedAccountName, PlannedIssuer, PlannedProvider};

/// Time limit of a token, and of each document of the issuer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The issuer where no role is assumed by a token.
const NO_ISSUER_NEEDED: &str = "https://issuer.invalid";

/// Writes the IAM resources for this node's roles: the OIDC provider and the trust policies
///
/// The roles are those of the configuration. The issuer is that of a live token, for which the
/// command has to run as the daemon runs, as root. Or give it by --issuer. The command sends no
/// request to AWS. If a policy would admit more than the daemon does, a warning with an example is
/// on standard error.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sudo awsvid trust-policy > iam.sh          commands to review and run
  sudo awsvid trust-policy --format terraform --new-provider > awsvid.tf
  awsvid trust-policy --issuer https://oidc.example.org \\
    --format cloudformation --existing-provider
  sudo awsvid trust-policy --account aws-cn:123456789012 --existing-provider

Exit status: 0 on success, 78 if the configuration has errors, 1 if the issuer
is unknown, no role is at AWS, the roles are in several accounts, or the choice
of the provider is missing.")]
pub struct TrustPolicyArgs {
    /// Path of the daemon's configuration file [default: /etc/awsvid/awsvid.toml]
    #[arg(
        long,
        env = "AWSVID_CONFIG",
        value_name = "FILE",
        default_value = "/etc/awsvid/awsvid.toml",
        hide_default_value = true
    )]
    config: PathBuf,
    /// Language of the output [default: aws-cli]
    #[arg(long, value_enum, default_value = "aws-cli", hide_default_value = true)]
    format: Format,
    /// Issuer of the tokens (SPIRE's `jwt_issuer`). Without it, the issuer of a live token
    #[arg(long, value_name = "URL")]
    issuer: Option<String>,
    /// Only this account's roles, as 123456789012, or with its partition as aws-cn:123456789012.
    /// Terraform and CloudFormation create the resources of one account at a time
    #[arg(long, value_name = "NUMBER")]
    account: Option<String>,
    /// Uses the OIDC provider that the accounts have for this issuer already
    #[arg(long)]
    existing_provider: bool,
    /// Creates the OIDC provider. The AWS CLI's commands do so by themselves, if there is none.
    /// Terraform and CloudFormation cannot check that, and need this option or the previous one
    #[arg(long, conflicts_with = "existing_provider")]
    new_provider: bool,
    /// Writes the thumbprint of the issuer's certificate although this machine does not trust that
    /// certificate. Compare it with your own CA's first: AWS will trust every server that has such
    /// a certificate
    #[arg(long, conflicts_with = "existing_provider")]
    accept_untrusted_issuer: bool,
    /// SPIFFE ID for roles with an ARN that depends on it (`{path[N]}`). Those of workload rules
    /// are known
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse)]
    spiffe_id: Vec<SpiffeId>,
}

/// Language of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A shell script with commands of the AWS CLI and their JSON documents.
    AwsCli,
    /// Resources of Terraform's AWS provider.
    Terraform,
    /// A CloudFormation template in JSON.
    Cloudformation,
}

/// Writes the resources to standard output, and warnings to standard error.
#[expect(
    clippy::print_stderr,
    reason = "errors of this command go to standard error"
)]
pub fn run(options: &TrustPolicyArgs) -> ExitStatus {
    let config = match Config::load(&options.config, Exposure::Ignored, |name| {
        std::env::var(name).ok()
    }) {
        Ok(loaded) => loaded.config,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitStatus::Config;
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("awsvid: {error}");
            return ExitStatus::Failure;
        }
    };
    let planned = runtime.block_on(plan(options, &config));
    runtime.shutdown_background();
    let rendered = planned.and_then(|plan| {
        plan.warnings
            .iter()
            .for_each(|warning| eprintln!("warning: {warning}"));
        render(&plan, options.format)
    });
    let written = rendered.and_then(|text| Ok(io::stdout().write_all(text.as_bytes())?));
    match written {
        Ok(()) => ExitStatus::Success,
        Err(error) => {
            eprintln!("awsvid: {error}");
            ExitStatus::Failure
        }
    }
}

fn render(plan: &Plan, format: Format) -> Result<String, TrustPolicyError> {
    if format == Format::AwsCli {
        return Ok(aws_cli::render(plan));
    }
    let accounts: Vec<(&PlannedAccountName, &PlannedAccount)> = plan.accounts.iter().collect();
    let [(name, account)] = accounts[..] else {
        let names: Vec<String> = accounts.iter().map(|(name, _)| name.to_string()).collect();
        return Err(TrustPolicyError::SeveralAccounts(names.join(", ")));
    };
    Ok(match format {
        Format::AwsCli => aws_cli::render(plan),
        Format::Terraform => terraform::render(plan, name, account),
        Format::Cloudformation => cloudformation::render(plan, name, account),
    })
}

async fn plan(options: &TrustPolicyArgs, config: &Config) -> Result<Plan, TrustPolicyError> {
    let uses_tokens = config
        .roles
        .defined
        .iter()
        .any(|role| role.exchange.uses_jwt());
    let has_choice = options.existing_provider || options.new_provider;
    if options.format != Format::AwsCli && uses_tokens && !has_choice {
        return Err(TrustPolicyError::NoChoiceOfProvider);
    }
    let mut warnings = Vec::new();
    let anywhere = match &config.roles_anywhere.target {
        Some(target) => {
            let bundle = live_token::bundle(config, REQUEST_TIMEOUT).await;
            let bundle = bundle.unwrap_or_else(|error| {
                warnings.push(format!("the trust anchor is left out: {error}"));
                Vec::new()
            });
            let (planned, doubts) =
                PlannedAnywhere::new(target.clone(), &bundle, Clock::system().now());
            warnings.extend(doubts);
            Some(planned)
        }
        None => None,
    };
    let live = match uses_tokens {
        true => live_issuer(config).await,
        // No resource has it.
        false => Ok(NO_ISSUER_NEEDED.to_owned()),
    };
    let issuer = match (&options.issuer, live) {
        (None, live) => live?,
        (Some(named), Ok(live)) if *named != live => {
            warnings.push(format!(
                "--issuer is {named}, but this node's tokens are issued by {live}: STS will reject them"
            ));
            named.clone()
        }
        (Some(named), _) => named.clone(),
    };
    let issuer = PlannedIssuer::parse(&issuer)?;
    let (provider, doubts) = match options.existing_provider || !uses_tokens {
        true => (PlannedProvider::Existing, None),
        false => {
            let (thumbprint, doubts) = thumbprint(&issuer, options.accept_untrusted_issuer).await;
            (PlannedProvider::New { thumbprint }, doubts)
        }
    };
    let ids: Vec<SpiffeId> = config
        .workloads
        .iter()
        .map(|workload| workload.rule.spiffe_id())
        .chain(&options.spiffe_id)
        .cloned()
        .collect();
    let mut plan = Plan::new(&config.roles, &ids, issuer, provider, anywhere);
    plan.warnings.extend(doubts);
    plan.warnings.extend(warnings);
    if let Some(account) = &options.account {
        plan.accounts.retain(|name, _| name.is(account));
    }
    if plan.accounts.is_empty() {
        return Err(TrustPolicyError::NoRole {
            in_account: options.account.is_some(),
            warnings: plan.warnings,
        });
    }
    Ok(plan)
}

/// Returns the issuer of this node's tokens.
async fn live_issuer(config: &Config) -> Result<String, NoLiveSvid> {
    let roles = &config.roles.defined;
    let example = roles
        .iter()
        .find_map(|role| Some((live_token::example(config, role)?, role.audience.clone())));
    let (id, audience) = match example {
        Some(example) => example,
        None if live_token::by_rules(config) => {
            return Err(NoLiveSvid::NoIdentity);
        }
        None => {
            let audience = roles
                .first()
                .map_or(&config.identity.audience, |role| &role.audience)
                .clone();
            (live_token::own(config, REQUEST_TIMEOUT).await?, audience)
        }
    };
    let token = live_token::fetch(config, &id, &audience, REQUEST_TIMEOUT).await?;
    token.issuer().ok_or(NoLiveSvid::NoClaim)
}

/// Returns the thumbprint that IAM needs, and a warning.
///
/// AWS trusts public CAs, and needs a thumbprint for other chains. A chain that this machine does
/// not trust may be an attacker's, so its thumbprint is returned only if it is `accepted` (T35).
async fn thumbprint(issuer: &PlannedIssuer, accepted: bool) -> (Option<String>, Option<String>) {
    if !issuer.url().starts_with("https://") {
        return (None, None);
    }
    let network = NetworkSettings::from_env(|name| std::env::var(name).ok());
    let web = HttpProbe {
        resolve: Vec::new(),
        network: Some(network),
        deadline: REQUEST_TIMEOUT,
    };
    let chain = async {
        let url = live_token::discovery_url(issuer.url());
        let document = web.get(&url).await.map_err(|error| error.to_string())?;
        let discovery: Value = serde_json::from_slice(&document.body)
            .map_err(|_| "its discovery document is not JSON")?;
        let keys = discovery["jwks_uri"]
            .as_str()
            .ok_or("its discovery document has no `jwks_uri`")?;
        let keys = web.get(keys).await.map_err(|error| error.to_string())?;
        Ok::<_, String>(keys.chain)
    };
    let url = issuer.url();
    match chain.await {
        Ok(Some(ServerChain {
            distrust: Some(distrust),
            thumbprint,
        })) => {
            let what = format!(
                "issuer {url}: this machine does not trust the certificate that its keys are served with ({distrust}). AWS trusts \
                 every server with a certificate of this thumbprint: compare {thumbprint} with your own CA's (openssl x509 -noout -fingerprint \
                 -sha1)"
            );
            match accepted {
                true => (Some(thumbprint), Some(what)),
                false => (
                    None,
                    Some(format!(
                        "{what}, and run this again with --accept-untrusted-issuer; it is left out here"
                    )),
                ),
            }
        }
        Ok(_) => (None, None),
        Err(error) => (
            None,
            Some(format!(
                "issuer {url}: cannot check whether IAM needs a thumbprint: {error}"
            )),
        ),
    }
}

#[cfg(test)]
mod tests;
