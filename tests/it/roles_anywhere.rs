//! IAM Roles Anywhere: the verifying server of `awsvid dev`, AWS's own client, and awsvid with
//! each kind of key and each identity source.

mod aws_client;
mod commands;
mod outages;
mod server;
mod spire;
