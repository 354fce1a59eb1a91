//! IAM Roles Anywhere: the verifying server of `awsvid dev`, AWS's own two clients, and awsvid with
//! each kind of key and each identity source.

mod aws_client;
mod chains;
mod commands;
mod expiry;
mod outages;
mod python_client;
pub(crate) mod server;
mod spire;
