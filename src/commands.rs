//! The operator's commands. Nothing but main.rs imports them.

pub mod check;
mod live;
pub mod trust_policy;
mod web;
