//! Python's clients, and those of C++ and Rust that are used from Python.

use super::{Client, Start, UNSIGNED, Version};

pub(super) fn clients() -> Vec<Client> {
    vec![
        client(
            "boto3",
            &["client-boto3", "tests/clients/python/read.py", "boto3"],
            Version::Locked {
                file: "tests/clients/python/boto3/requirements.txt",
                after: "boto3==",
            },
        ),
        client(
            "boto3 of Debian 12",
            &["client-boto3-1.26", "tests/clients/python/read.py", "boto3"],
            Version::Locked {
                file: "tests/clients/python/boto3-1.26/requirements.txt",
                after: "boto3==",
            },
        ),
        client(
            "s3fs",
            &["client-s3fs", "tests/clients/python/read.py", "s3fs"],
            Version::Locked {
                file: "tests/clients/python/s3fs/requirements.txt",
                after: "s3fs==",
            },
        ),
        client(
            "polars",
            &["client-polars", "tests/clients/python/read.py", "polars"],
            Version::Locked {
                file: "tests/clients/python/polars/requirements.txt",
                after: "polars==",
            },
        ),
        Client {
            note: UNSIGNED,
            ..client(
                "C++ (pyarrow)",
                &["client-pyarrow", "tests/clients/python/read.py", "pyarrow"],
                Version::Locked {
                    file: "tests/clients/python/pyarrow/requirements.txt",
                    after: "pyarrow==",
                },
            )
        },
        client(
            "CRT (awscrt)",
            &["client-awscrt", "tests/clients/python/read.py", "awscrt"],
            Version::Locked {
                file: "tests/clients/python/awscrt/requirements.txt",
                after: "awscrt==",
            },
        ),
    ]
}

fn client(name: &'static str, words: &'static [&'static str], version: Version) -> Client {
    Client {
        name,
        registry: "PyPI",
        version,
        start: Start::Program(words),
        environment: &[],
        note: "",
    }
}
