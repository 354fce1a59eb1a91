//! The errors of `awsvid trust-policy`.

use std::io;

use thiserror::Error;

use super::plan::InvalidIssuer;
use crate::commands::live_token::NoLiveSvid;

/// Reason why the command has no output.
#[derive(Debug, Error)]
pub(super) enum TrustPolicyError {
    #[error("{0}\nawsvid: without a token, give the issuer with --issuer")]
    NoIssuer(#[from] NoLiveSvid),
    #[error(transparent)]
    InvalidIssuer(#[from] InvalidIssuer),
    /// The warnings have the reason.
    #[error(
        "no role is at AWS{}\n{}",
        if *.in_account { ", in that account" } else { "" },
        .warnings.join("\n")
    )]
    NoRole {
        /// True if the user has named an account.
        in_account: bool,
        warnings: Vec<String>,
    },
    /// Names of the accounts, of which this format takes one.
    #[error("the roles are in several accounts: choose one with --account ({0})")]
    SeveralAccounts(String),
    /// Terraform and CloudFormation would fail to create a provider again.
    #[error(
        "Terraform and CloudFormation cannot check whether the account has an OIDC provider for this issuer, and would \
         fail to create it again: add --existing-provider, or --new-provider"
    )]
    NoChoiceOfProvider,
    #[error(transparent)]
    Output(#[from] io::Error),
}
