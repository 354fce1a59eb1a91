//! A process that an integration test starts as another user.

fn main() {}
