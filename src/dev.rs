//! `awsvid dev`: the complete path without an AWS account and without SPIRE.
//!
//! The daemon's counterparts run on loopback, and really work. [`workload_api`] signs JWT-SVIDs
//! with a key of [`keys`] that lives as long as the run. [`oidc`] publishes the key, and [`sts`]
//! verifies with the published one. Likewise [`authority`] issues X.509-SVIDs, which [`sts`]
//! verifies as IAM Roles Anywhere.
//!
//! Between them runs the ordinary daemon with an ordinary configuration ([`Dev::configuration`]).
//! So no code of `dev` is in the request path, and no configuration file can enable `dev`.

use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{Uid, User as SystemUser, geteuid};
use tempfile::TempDir;
use thiserror::Error;

use crate::clock::Clock;
use crate::config::{DEV_ACCOUNT, DEV_TRUST_DOMAIN};
use crate::identity::{RoleArn, SpiffeIdPattern};
use crate::sdk_environment::Environment;

pub mod authority;
pub mod child;
mod environment;
pub mod keys;
pub mod local_users;
mod loopback_http;
pub mod oidc;
mod run;
pub mod sts;
pub mod workload_api;

use authority::DevAuthority;
use environment::Endpoints;
use keys::SigningKey;
use local_users::User;
use oidc::DevOidcIssuer;
pub use run::run;
use sts::{
    CertifiedRole, ChainedTrust, DevAccount, DevProvider, DevSts, DevTrustAnchor, TrustedRole,
};
use workload_api::{DevWorkloadApi, Registrations};

/// Audience of the tokens. It is not AWS's, so that AWS accepts none of them (an audience belongs
/// to one endpoint).
const AUDIENCE: &str = "awsvid-dev";
const REGION: &str = "us-east-1";
/// `MaxSessionDuration` of the role. Every valid `duration` can be tried.
const MAX_SESSION: Duration = Duration::from_secs(12 * 3600);

/// Reason why `dev` does not start.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct DevStartError {
    what: &'static str,
    source: io::Error,
}

impl DevStartError {
    fn of<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        what: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |error| Self {
            what,
            source: io::Error::other(error),
        }
    }
}

/// Names of the identities and the role.
#[derive(Debug, Clone)]
pub struct DevNames {
    /// Trust domain of all identities.
    pub trust_domain: String,
    /// Account of the roles: `dev`, `dev-certificate`, and `dev-chained`, which only sessions of
    /// `dev` may assume.
    pub account: String,
}

impl Default for DevNames {
    /// Returns the names of the command. No production configuration may have them.
    fn default() -> Self {
        Self {
            trust_domain: DEV_TRUST_DOMAIN.to_owned(),
            account: DEV_ACCOUNT.to_owned(),
        }
    }
}

impl DevNames {
    fn role_arn(&self) -> String {
        format!("arn:aws:iam::{}:role/dev", self.account)
    }

    /// Returns the ARN of the role that is assumed by a certificate.
    fn certified_role_arn(&self) -> String {
        format!("arn:aws:iam::{}:role/dev-certificate", self.account)
    }

    /// Returns the ARN of a resource of IAM Roles Anywhere.
    fn anywhere_arn(&self, resource: &str) -> String {
        format!(
            "arn:aws:rolesanywhere:{REGION}:{}:{resource}/dev",
            self.account
        )
    }

    fn chained_role_arn(&self) -> String {
        format!("arn:aws:iam::{}:role/dev-chained", self.account)
    }

    fn all_users(&self) -> String {
        format!("spiffe://{}/user/*", self.trust_domain)
    }
}

/// The counterparts of the daemon. They end when this value is dropped.
#[derive(Debug)]
pub struct Dev {
    names: DevNames,
    workload_api: DevWorkloadApi,
    _issuer: DevOidcIssuer,
    sts: DevSts,
    users: Vec<User>,
    /// Removed with its content after the servers have ended.
    directory: TempDir,
}

impl Dev {
    /// Starts the servers for the user that runs the command, and for root also for the people of
    /// this machine. On return each server is bound.
    pub async fn start() -> Result<Self, DevStartError> {
        let users = local_users::identities(accounts()).map_err(DevStartError::of("the users"))?;
        Self::start_for(users, DevNames::default()).await
    }

    /// Does the same for these users, at least one, under these names.
    pub async fn start_for(users: Vec<User>, names: DevNames) -> Result<Self, DevStartError> {
        let directory = directory().map_err(DevStartError::of("a directory for the sockets"))?;
        let key =
            Arc::new(SigningKey::generate().map_err(DevStartError::of("a key to sign with"))?);
        let issuer = DevOidcIssuer::start(key.jwks())
            .await
            .map_err(DevStartError::of("the OpenID Connect issuer"))?;
        let authority = DevAuthority::generate(&names.trust_domain, Clock::system().now());
        let authority = Arc::new(authority.map_err(DevStartError::of("a certificate authority"))?);
        let account =
            account(issuer.url(), &authority, &names).map_err(DevStartError::of("the roles"))?;
        let sts = DevSts::start(account, Clock::system())
            .await
            .map_err(DevStartError::of("the STS"))?;
        let registrations = Registrations {
            trust_domain: names.trust_domain.clone(),
            spiffe_ids: users.iter().map(|user| user.spiffe_id.clone()).collect(),
            issuer: issuer.url().to_owned(),
            key,
            authority,
            clock: Clock::system(),
        };
        let workload_api =
            DevWorkloadApi::start(&directory.path().join("workload-api"), registrations)
                .map_err(DevStartError::of("the Workload API"))?;
        Ok(Self {
            names,
            workload_api,
            _issuer: issuer,
            sts,
            users,
            directory,
        })
    }

    /// Returns the users that are served. The user that runs the command comes first.
    pub fn users(&self) -> &[User] {
        &self.users
    }

    /// Returns the STS of this run.
    pub fn sts(&self) -> &DevSts {
        &self.sts
    }

    /// Returns the path of the daemon's unix socket.
    pub fn socket(&self) -> PathBuf {
        self.path("awsvid.sock")
    }

    /// Returns the daemon's configuration as the text of a file, with this port of 127.0.0.1 for
    /// SDKs. With 0 the kernel picks the port.
    ///
    /// With `quiet`, standard output and standard error stay free for a command. Audit records go
    /// to a file that is removed with this value, and the log has errors only.
    pub fn configuration(&self, port: u16, quiet: bool) -> String {
        let (audit, level) = if quiet {
            (self.path("audit.log"), "error")
        } else {
            (PathBuf::from("-"), "info")
        };
        let rules: String = self
            .users
            .iter()
            .map(|user| {
                format!(
                    "\n[[workload]]\nspiffe_id = \"{}\"\nuid = {}\n",
                    user.spiffe_id, user.uid
                )
            })
            .collect();
        format!(
            "[listen]\nunix = {unix}\ntcp = [\"127.0.0.1:{port}\"]\nadmin = \"127.0.0.1:0\"\nstatus = {status}\n\
             token_file = {token}\n\n\
             [identity]\nsource = \"workload-api\"\nworkload_api_socket = {socket}\naudience = \"{AUDIENCE}\"\n\n\
             [sts]\nregion = \"{REGION}\"\nendpoint = \"{sts}\"\n\n\
             [roles_anywhere]\ntrust_anchor_arn = \"{anchor}\"\nprofile_arn = \"{profile}\"\nendpoint = \"{sts}\"\n\n\
             [audit]\nfile = {audit}\n\n\
             [log]\nlevel = \"{level}\"\n\n\
             [[role]]\nname = \"dev\"\nspiffe_id = \"{all_users}\"\nrole_arn = \"{role_arn}\"\n\
             audience = \"{AUDIENCE}\"\n\n\
             [[role]]\nname = \"dev-certificate\"\nspiffe_id = \"{all_users}\"\nrole_arn = \"{certified_role_arn}\"\n\
             exchange = \"roles-anywhere\"\n\n\
             [[role]]\nname = \"chained\"\nspiffe_id = \"{all_users}\"\nrole_arn = \"{role_arn}\"\n\
             audience = \"{AUDIENCE}\"\n\
             [[role.chain]]\nrole_arn = \"{chained_role_arn}\"\nsource_identity = \"user={{path[1]}}\"\n\
             tags = {{ \"user\" = \"{{path[1]}}\" }}\n{rules}",
            unix = toml_string(&self.socket()),
            status = toml_string(&self.path("status.sock")),
            token = toml_string(&self.path("token")),
            socket = toml::Value::from(self.workload_api.address()),
            sts = self.sts.url(),
            all_users = self.names.all_users(),
            role_arn = self.names.role_arn(),
            certified_role_arn = self.names.certified_role_arn(),
            anchor = self.names.anywhere_arn("trust-anchor"),
            profile = self.names.anywhere_arn("profile"),
            chained_role_arn = self.names.chained_role_arn(),
            audit = toml_string(&audit),
        )
    }

    /// Returns the variables for SDKs. The daemon has to serve `credentials` and to have written
    /// its token file. `inherited` reads the variables of this process.
    pub fn environment(
        &self,
        credentials: SocketAddr,
        inherited: impl Fn(&str) -> Option<String>,
    ) -> io::Result<Environment> {
        let token_file = &self.path("token");
        environment::environment(
            &Endpoints {
                credentials,
                token_file,
                sts: self.sts.url(),
                region: REGION,
            },
            inherited,
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Creates a directory that other users can enter only if others are served.
fn directory() -> io::Result<TempDir> {
    let (base, mode) = match geteuid().is_root() {
        // Root's temporary directory may be closed to other users.
        true if Path::new("/run").is_dir() => (PathBuf::from("/run"), 0o755),
        true => (std::env::temp_dir(), 0o755),
        false => (std::env::temp_dir(), 0o700),
    };
    let directory = tempfile::Builder::new()
        .prefix("awsvid-dev.")
        .tempdir_in(base)?;
    std::fs::set_permissions(directory.path(), Permissions::from_mode(mode))?;
    if directory.path().to_str().is_none() {
        return Err(io::Error::other(
            "its path is not UTF-8; set TMPDIR to another one",
        ));
    }
    Ok(directory)
}

fn accounts() -> Vec<local_users::LocalAccount> {
    let own = geteuid();
    let account = |uid: Uid| {
        // Without an entry in the user database the number is used.
        let name = SystemUser::from_uid(uid)
            .ok()
            .flatten()
            .map(|user| user.name);
        local_users::LocalAccount {
            uid: uid.as_raw(),
            name,
        }
    };
    let mut accounts = vec![account(own)];
    if own.is_root() {
        let sudo = std::env::var("SUDO_UID")
            .ok()
            .and_then(|uid| uid.parse().ok());
        accounts.extend(sudo.map(|uid| account(Uid::from_raw(uid))));
        accounts.extend(local_users::people(
            &std::fs::read_to_string("/etc/passwd").unwrap_or_default(),
        ));
    }
    accounts
}

/// Returns the IAM resources of an administrator: the provider, the trust anchor, and the roles
/// with their trust policies.
fn account(
    issuer: &str,
    authority: &DevAuthority,
    names: &DevNames,
) -> Result<DevAccount, crate::identity::InvalidName> {
    let subjects = vec![SpiffeIdPattern::parse(&names.all_users())?];
    Ok(DevAccount {
        region: REGION.to_owned(),
        providers: vec![DevProvider {
            issuer: issuer.to_owned(),
            client_ids: vec![AUDIENCE.to_owned()],
        }],
        roles: vec![TrustedRole {
            arn: RoleArn::parse(&names.role_arn())?,
            issuer: issuer.to_owned(),
            audience: AUDIENCE.to_owned(),
            subjects: subjects.clone(),
            max_duration: MAX_SESSION,
        }],
        trust_anchors: vec![DevTrustAnchor {
            arn: names.anywhere_arn("trust-anchor"),
            profile_arn: names.anywhere_arn("profile"),
            certificates: vec![authority.certificate().clone()],
            accepts_session_name: true,
            roles: vec![CertifiedRole {
                arn: RoleArn::parse(&names.certified_role_arn())?,
                subjects,
                max_duration: MAX_SESSION,
            }],
        }],
        chained: vec![ChainedTrust {
            arn: RoleArn::parse(&names.chained_role_arn())?,
            principal: RoleArn::parse(&names.role_arn())?,
            external_id: None,
            tag_session: true,
            set_source_identity: true,
        }],
    })
}

/// Returns a path as a TOML string.
fn toml_string(path: &Path) -> toml::Value {
    toml::Value::from(path.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
