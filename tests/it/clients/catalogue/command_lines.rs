//! Command lines that contain the SDK: each run fetches credentials again.

use super::{Client, Start, Version};

pub(super) fn clients() -> Vec<Client> {
    vec![
        Client {
            name: "AWS CLI v2",
            registry: "Debian",
            version: Version::Printed(&["--version"]),
            start: Start::Command(&[
                "aws2",
                "--endpoint-url",
                "{endpoint}",
                "s3",
                "cp",
                "s3://{bucket}/{key}",
                "-",
            ]),
            environment: &[],
            note: "",
        },
        Client {
            name: "AWS CLI v1",
            registry: "PyPI",
            version: Version::Locked {
                file: "tests/counterparts/awscli/requirements.txt",
                after: "awscli==",
            },
            start: Start::Command(&[
                "aws",
                "--endpoint-url",
                "{endpoint}",
                "s3",
                "cp",
                "s3://{bucket}/{key}",
                "-",
            ]),
            environment: &[],
            note: "",
        },
    ]
}
