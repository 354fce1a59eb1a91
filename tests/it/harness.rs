//! What the tests share: the real counterparts, the daemon itself, and a systemd.

pub(crate) mod counterparts;
pub(crate) mod daemon;
pub(crate) mod systemd;
