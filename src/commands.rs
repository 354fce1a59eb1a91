//! The operator's commands. Nothing but main.rs imports them.

mod live;
pub mod trust_policy;
mod web;
