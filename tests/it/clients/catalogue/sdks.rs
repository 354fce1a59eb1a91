//! AWS's SDKs for languages other than Python, and clients that are built on them or use none.

use super::{Client, Start, UNSIGNED, Version};

/// Returns the SDKs. PHP's is missing: Debian has no package of it.
pub(super) fn clients() -> Vec<Client> {
    let ruby = Version::Printed(&["-e", "require 'aws-sdk-core'; puts Aws::CORE_GEM_VERSION"]);
    vec![
        npm_v3("JavaScript v3", &["aws-sdk-js-v3"]),
        npm_v3("JavaScript v3, `fromHttp`", &["aws-sdk-js-v3-from-http"]),
        npm("JavaScript v2", &["aws-sdk-js-v2"], "\"aws-sdk\": "),
        go("Go v2", &["aws-sdk-go-v2"], "github.com/aws/aws-sdk-go-v2 "),
        go("Go v1", &["aws-sdk-go-v1"], "github.com/aws/aws-sdk-go "),
        maven(
            "Java v2",
            &["aws-sdk-java-v2"],
            "<artifactId>s3</artifactId>",
        ),
        Client {
            note: UNSIGNED,
            ..maven(
                "Java v1",
                &["aws-sdk-java-v1"],
                "<artifactId>aws-java-sdk-s3</artifactId>",
            )
        },
        cargo("Rust", &["aws-sdk-rust"], "name = \"aws-config\"\n"),
        cargo(
            "object_store",
            &["object-store"],
            "name = \"object_store\"\n",
        ),
        Client {
            note: "from 3.171 on (Debian 13); a client object that got no credentials when it was made never requests them again",
            ..program(
                "Ruby",
                "Debian",
                &["ruby", "tests/clients/ruby/sdk.rb"],
                ruby,
            )
        },
        go("minio-go", &["minio-go"], "github.com/minio/minio-go/v7 "),
        mc(),
        rclone(),
    ]
}

fn npm(name: &'static str, words: &'static [&'static str], after: &'static str) -> Client {
    program(
        name,
        "npm",
        words,
        Version::Locked {
            file: "tests/clients/javascript/package.json",
            after,
        },
    )
}

fn npm_v3(name: &'static str, words: &'static [&'static str]) -> Client {
    Client {
        note: "warns that the token and its file are both set",
        ..npm(name, words, "\"@aws-sdk/client-s3\": ")
    }
}

fn go(name: &'static str, words: &'static [&'static str], after: &'static str) -> Client {
    program(
        name,
        "Go",
        words,
        Version::Locked {
            file: "tests/clients/go/go.mod",
            after,
        },
    )
}

fn maven(name: &'static str, words: &'static [&'static str], after: &'static str) -> Client {
    program(
        name,
        "Maven",
        words,
        Version::Locked {
            file: "tests/clients/java/pom.xml",
            after,
        },
    )
}

fn cargo(name: &'static str, words: &'static [&'static str], after: &'static str) -> Client {
    program(
        name,
        "Cargo",
        words,
        Version::Locked {
            file: "tests/clients/rust/Cargo.lock",
            after,
        },
    )
}

fn program(
    name: &'static str,
    registry: &'static str,
    words: &'static [&'static str],
    version: Version,
) -> Client {
    Client {
        name,
        registry,
        version,
        start: Start::Program(words),
        environment: &[],
        note: "",
    }
}

fn mc() -> Client {
    Client {
        name: "mc (minio-go)",
        registry: "Go",
        version: Version::Locked {
            file: "tests/counterparts/mc/go.mod",
            after: "github.com/minio/minio-go/v7 ",
        },
        start: Start::Command(&["mc", "--quiet", "cat", "m/{bucket}/{key}"]),
        // Without an STS it uses no credentials but the alias's. The token's file precedes that
        // STS.
        environment: &[
            ("MC_HOST_m", "{endpoint}"),
            ("MC_STS_ENDPOINT_m", "{endpoint}"),
        ],
        note: "needs `MC_STS_ENDPOINT_<alias>`, with any URL; without credentials it sends its request unsigned",
    }
}

fn rclone() -> Client {
    Client {
        name: "rclone",
        registry: "Go",
        version: Version::Locked {
            file: "tests/clients/rclone/go.mod",
            after: "github.com/rclone/rclone ",
        },
        // Otherwise it lists the bucket, which takes a right that reading does not need.
        start: Start::Command(&["rclone", "cat", "--no-traverse", "m:{bucket}/{key}"]),
        environment: &[
            ("RCLONE_CONFIG_M_TYPE", "s3"),
            ("RCLONE_CONFIG_M_PROVIDER", "Minio"),
            ("RCLONE_CONFIG_M_ENDPOINT", "{endpoint}"),
            ("RCLONE_CONFIG_M_ENV_AUTH", "true"),
        ],
        note: "with `env_auth = true`",
    }
}
