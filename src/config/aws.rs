//! STS endpoints and regions, and the names that AWS has for its own.

use std::net::IpAddr;

use hyper::Uri;

use super::error::InvalidValue;

/// A partition of AWS, by the names of its regions and hosts. A test compares it with the SDK's.
struct Partition {
    name: &'static str,
    /// Prefix of its regions, before `-<word>-<number>`. Empty for `aws`, where it is two letters.
    regions: &'static str,
    /// The suffix of its host names, and of its dual-stack host names.
    suffixes: [&'static str; 2],
}

/// The partition of all other regions.
const COMMERCIAL: Partition = Partition {
    name: "aws",
    regions: "",
    suffixes: ["amazonaws.com", "api.aws"],
};
const PARTITIONS: [Partition; 7] = [
    Partition {
        name: "aws-cn",
        regions: "cn",
        suffixes: ["amazonaws.com.cn", "api.amazonwebservices.com.cn"],
    },
    Partition {
        name: "aws-us-gov",
        regions: "us-gov",
        suffixes: ["amazonaws.com", "api.aws"],
    },
    Partition {
        name: "aws-eusc",
        regions: "eusc-de",
        suffixes: ["amazonaws.eu", "api.amazonwebservices.eu"],
    },
    Partition {
        name: "aws-iso",
        regions: "us-iso",
        suffixes: ["c2s.ic.gov", "api.aws.ic.gov"],
    },
    Partition {
        name: "aws-iso-b",
        regions: "us-isob",
        suffixes: ["sc2s.sgov.gov", "api.aws.scloud"],
    },
    Partition {
        name: "aws-iso-e",
        regions: "eu-isoe",
        suffixes: ["cloud.adc-e.uk", "api.cloud-aws.adc-e.uk"],
    },
    Partition {
        name: "aws-iso-f",
        regions: "us-isof",
        suffixes: ["csp.hci.ic.gov", "api.aws.hci.ic.gov"],
    },
];

impl Partition {
    /// Returns the partition of a region; `None` if AWS has no regions of such a form.
    fn of_region(region: &str) -> Option<&'static Self> {
        let (rest, number) = region.rsplit_once('-')?;
        let (prefix, word) = rest.rsplit_once('-')?;
        let is_region = !number.is_empty()
            && number.bytes().all(|c| c.is_ascii_digit())
            && !word.is_empty()
            && word.bytes().all(|c| c.is_ascii_lowercase());
        let is_continent = prefix.len() == 2 && prefix.bytes().all(|c| c.is_ascii_lowercase());
        let own = PARTITIONS
            .iter()
            .find(|partition| partition.regions == prefix);
        own.or(is_continent.then_some(&COMMERCIAL))
            .filter(|_| is_region)
    }
}

/// Parses the URL of an STS endpoint and returns its normal form. Two ways to write one endpoint
/// have the same form.
///
/// Without TLS a host on the way could read the tokens, so `http` is for loopback only.
pub(super) fn sts_endpoint(text: &str) -> Result<String, InvalidValue> {
    let uri: Uri = text.parse().map_err(|_| "it is not a URL")?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err("it is not a URL with a scheme and a host".into());
    };
    let host = authority.host().to_ascii_lowercase();
    let port = authority.port_u16();
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    let is_name = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_');
    if address.is_err() && (host.is_empty() || !host.bytes().all(is_name)) {
        return Err(format!("`{host}` is not a host").into());
    }
    // The rest would be a user name, or a port that is not a number.
    let length = host.len() + port.map_or(0, |port| port.to_string().len() + 1);
    if authority.as_str().len() != length || port == Some(0) {
        return Err("after the host there may be a port, and nothing may stand before it".into());
    }
    if uri.query().is_some() || text.contains('#') {
        return Err("it has a query or a fragment".into());
    }
    let (scheme, default_port) = match scheme.to_ascii_lowercase().as_str() {
        "https" => ("https", 443),
        "http" if host == "localhost" || address.is_ok_and(|address| address.is_loopback()) => {
            ("http", 80)
        }
        "http" => return Err("without TLS others on the network could read the tokens".into()),
        _ => return Err("its scheme is not https".into()),
    };
    let port = port
        .filter(|port| *port != default_port)
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    Ok(format!(
        "{scheme}://{host}{port}{}",
        uri.path().trim_end_matches('/')
    ))
}

/// Returns whether this STS is AWS's: the default one, or a URL of AWS's STS itself.
pub(crate) fn is_aws(endpoint: Option<&str>) -> bool {
    endpoint.is_none_or(|url| url.strip_prefix("https://").is_some_and(is_aws_sts_host))
}

/// Returns whether this is the host name of AWS's STS, in any region or partition, with FIPS or at
/// a VPC endpoint.
///
/// Neither the suffix nor `sts.` before it is enough. Customers have names below AWS's suffixes,
/// such as that of a bucket `sts` (`sts.s3.amazonaws.com`, `sts.s3-eu-west-1.amazonaws.com`; T38).
pub(super) fn is_aws_sts_host(host: &str) -> bool {
    is_service_host(host, "sts")
}

/// Returns whether this is the host name of AWS's IAM Roles Anywhere, likewise.
pub(crate) fn is_aws_roles_anywhere_host(host: &str) -> bool {
    is_service_host(host, "rolesanywhere")
}

/// Returns the suffixes of AWS's host names in the partition of this region: those with IPv4, and
/// those with IPv6 as well.
pub(crate) fn host_suffixes(region: &str) -> [&'static str; 2] {
    Partition::of_region(region).unwrap_or(&COMMERCIAL).suffixes
}

fn is_service_host(host: &str, service: &str) -> bool {
    let is_service = |label: &str| label.strip_suffix("-fips").unwrap_or(label) == service;
    std::iter::once(&COMMERCIAL)
        .chain(&PARTITIONS)
        .any(|partition| {
            let is_region = |label: &str| {
                Partition::of_region(label).is_some_and(|of| of.name == partition.name)
            };
            partition.suffixes.iter().any(|suffix| {
                let rest = host
                    .strip_suffix(suffix)
                    .and_then(|rest| rest.strip_suffix('.'));
                match rest
                    .map(|rest| rest.split('.').collect::<Vec<_>>())
                    .as_deref()
                {
                    Some([label]) => is_service(label),
                    Some([label, region]) => is_service(label) && is_region(region),
                    Some([name, label, region, "vpce"]) => {
                        name.starts_with("vpce-") && is_service(label) && is_region(region)
                    }
                    _ => false,
                }
            })
        })
}

/// Parses the name of a region. It becomes part of a host name, so it has no other characters.
pub(super) fn region(text: &str) -> Result<String, &'static str> {
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let good = (1..=32).contains(&text.len())
        && text.bytes().all(allowed)
        && !text.starts_with('-')
        && !text.ends_with('-');
    if good {
        Ok(text.to_owned())
    } else {
        Err("a region's name takes a-z, 0-9 and '-'")
    }
}

/// Returns whether AWS could have a region of this name. All of them are like `eu-central-1`.
pub(super) fn is_aws_region(region: &str) -> bool {
    let parts: Vec<&str> = region.split('-').collect();
    let number = parts
        .last()
        .is_some_and(|last| !last.is_empty() && last.bytes().all(|c| c.is_ascii_digit()));
    parts.len() >= 3 && number
}

/// Returns the partition of a region. An unknown region counts as one of `aws`, as in the SDK.
pub(super) fn partition(region: &str) -> &'static str {
    Partition::of_region(region).unwrap_or(&COMMERCIAL).name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_has_one_form() {
        let table = [
            ("https://minio.internal:9000", "https://minio.internal:9000"),
            ("https://MinIO.internal:443/", "https://minio.internal"),
            ("HTTPS://minio/sts/", "https://minio/sts"),
            ("https://[2001:DB8::1]:9000", "https://[2001:db8::1]:9000"),
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
            ("http://127.8.8.8:80/", "http://127.8.8.8"),
            ("http://[::1]:9000/", "http://[::1]:9000"),
            ("http://localhost:9000", "http://localhost:9000"),
            ("https://10.0.0.1", "https://10.0.0.1"),
        ];
        for (text, form) in table {
            assert_eq!(sts_endpoint(text).as_deref(), Ok(form), "{text}");
            assert_eq!(
                sts_endpoint(form).as_deref(),
                Ok(form),
                "{form}: as it is given"
            );
        }
    }

    #[test]
    fn wrong_endpoint_is_an_error() {
        let table = [
            ("", "not a URL"),
            ("minio", "not a URL"),
            ("minio:9000", "not a URL"),
            ("/sts", "not a URL"),
            ("https://", "not a URL"),
            ("https://:9000", "is not a host"),
            ("https://a b", "not a URL"),
            ("https://m!nio", "is not a host"),
            ("https://[::1", "not a URL"),
            ("https://user@minio", "nothing may stand before it"),
            (
                "https://user:secret@minio:9000",
                "nothing may stand before it",
            ),
            ("https://minio:", "there may be a port"),
            ("https://minio:0", "there may be a port"),
            ("https://minio:65536", "there may be a port"),
            ("https://minio:0443", "there may be a port"),
            ("https://minio/?Action=x", "a query"),
            ("https://minio/#x", "a fragment"),
            ("ftp://minio", "scheme is not https"),
            ("unix:///run/minio.sock", "not a URL"),
            ("http://minio", "without TLS"),
            ("http://localhost.example.org", "without TLS"),
            ("http://127.0.0.1.example.org", "without TLS"),
            ("http://0.0.0.0:9000", "without TLS"),
            ("http://[::ffff:127.0.0.1]:9000", "without TLS"),
            ("http://127.1:9000", "without TLS"),
        ];
        for (text, words) in table {
            let error = sts_endpoint(text).expect_err(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn only_names_of_sts_itself_are_aws() {
        let aws = [
            "sts.amazonaws.com",
            "sts.eu-central-1.amazonaws.com",
            "sts-fips.us-east-1.amazonaws.com",
            "sts.cn-north-1.amazonaws.com.cn",
            "sts.us-east-1.api.aws",
            "sts.eusc-de-east-1.amazonaws.eu",
            "sts.us-iso-east-1.c2s.ic.gov",
            "sts.us-isob-east-1.sc2s.sgov.gov",
            "sts.us-gov-west-1.amazonaws.com",
            "sts.amazonaws.com.cn",
            "vpce-0a1b-xyz.sts.us-east-1.vpce.amazonaws.com",
            "vpce-0a1b-xyz-us-east-1a.sts-fips.us-east-1.vpce.amazonaws.com",
            "vpce-0a1b.sts.cn-north-1.vpce.amazonaws.com.cn",
            // A region that may exist one day.
            "sts.nz-north-12.amazonaws.com",
        ];
        for host in aws {
            assert!(is_aws_sts_host(host), "{host}");
            assert!(is_aws(Some(&format!("https://{host}"))), "{host}");
        }
        let others = [
            "minio.internal",
            "amazonaws.com",
            "s3.amazonaws.com",
            "sts.a.b.amazonaws.com",
            "sts.abc.execute-api.us-east-1.amazonaws.com",
            "evil.sts.us-east-1.vpce.amazonaws.com",
            "sts.example-amazonaws.com",
            "sts.amazonaws.com.example.org",
            "sts.us-east-1.amazonaws.com:8443",
            "sts.us-east-1.amazonaws.com.",
            "sts.us-east-1.amazonaws.com/x",
            // Attack 38: names of buckets, load balancers and other resources of customers.
            "sts.s3.amazonaws.com",
            "sts.s3-us-west-2.amazonaws.com",
            "sts.s3-fips.amazonaws.com",
            "sts.s3-website-us-east-1.amazonaws.com",
            "sts.s3.us-east-1.amazonaws.com",
            "sts.s3.cn-north-1.amazonaws.com.cn",
            "sts-fips.s3.amazonaws.com",
            "sts.elb.amazonaws.com",
            "sts.us-east-1.elb.amazonaws.com",
            "sts.elb-us-east-1.amazonaws.com",
            "sts.cloudfront.net",
            "sts.eu-1.amazonaws.com",
            "sts.us-east-1.on.aws",
            "vpce-0a1b.sts.s3.vpce.amazonaws.com",
            "vpce-0a1b.vpce-svc-0c2d.us-east-1.vpce.amazonaws.com",
            // A region under another partition's suffix.
            "sts.us-east-1.amazonaws.eu",
            "sts.cn-north-1.amazonaws.com",
            "sts.us-gov-west-1.amazonaws.com.cn",
        ];
        for host in others {
            assert!(!is_aws_sts_host(host), "{host}");
            assert!(!is_aws(Some(&format!("https://{host}"))), "{host}");
        }
        assert!(is_aws(None) && !is_aws(Some("http://sts.amazonaws.com")));
    }

    #[test]
    fn region_is_parsed_from_sts_host() {
        let table = [
            ("us-east-1", "aws"),
            ("ap-southeast-7", "aws"),
            ("cn-north-1", "aws-cn"),
            ("us-gov-west-1", "aws-us-gov"),
            ("us-iso-east-1", "aws-iso"),
            ("us-isob-east-1", "aws-iso-b"),
            ("eusc-de-east-1", "aws-eusc"),
        ];
        for (name, of) in table {
            assert_eq!(
                (
                    region(name).as_deref(),
                    is_aws_region(name),
                    partition(name)
                ),
                (Ok(name), true, of)
            );
        }
        for name in [
            "",
            "-",
            "eu-central-1-",
            "EU-central-1",
            "eu.central.1",
            "eu-central-1/x",
            "eu central",
            "é",
        ] {
            assert!(region(name).is_err(), "{name}");
        }
        for name in [
            "x",
            "frankfurt",
            "eu-central",
            "eu-central-1a",
            "aws-global",
            "1",
        ] {
            assert!(region(name).is_ok() && !is_aws_region(name), "{name}");
        }
    }

    /// Compares the hosts that the SDK calls with the table of partitions.
    #[tokio::test]
    async fn hosts_of_the_sdk_are_of_their_partition() {
        use aws_sdk_sts::config::endpoint::{DefaultResolver, Params, ResolveEndpoint};
        let table = [
            ("us-east-1", "aws"),
            ("il-central-1", "aws"),
            ("mx-central-1", "aws"),
            ("cn-northwest-1", "aws-cn"),
            ("us-gov-east-1", "aws-us-gov"),
            ("eusc-de-east-1", "aws-eusc"),
            ("us-iso-west-1", "aws-iso"),
            ("us-isob-east-1", "aws-iso-b"),
            ("eu-isoe-west-1", "aws-iso-e"),
            ("us-isof-south-1", "aws-iso-f"),
        ];
        let resolver = DefaultResolver::new();
        for (region, of) in table {
            assert_eq!(partition(region), of);
            for (fips, dual_stack) in [(false, false), (true, false), (false, true), (true, true)] {
                let params = Params::builder()
                    .region(region)
                    .use_fips(fips)
                    .use_dual_stack(dual_stack);
                let endpoint = resolver
                    .resolve_endpoint(&params.build().unwrap())
                    .await
                    .unwrap();
                assert!(is_aws(Some(endpoint.url())), "{}", endpoint.url());
            }
        }
    }
}
