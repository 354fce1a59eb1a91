//! The requests that all servers get. `{role}`, `{token}`, `{expired}` and `{address}` are each
//! server's own.

/// A request: its name in the document, its request line without the version, and its headers.
pub(super) struct MetadataRequest {
    pub(super) name: &'static str,
    pub(super) line: &'static str,
    pub(super) headers: &'static [&'static str],
}

const PUT: &str = "PUT /latest/api/token";
const LIST: &str = "GET /latest/meta-data/iam/security-credentials/";
const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds: 300";
const TOKEN: &str = "X-aws-ec2-metadata-token: {token}";
/// A token of the right length that no server has issued.
const FORGED: &str =
    "X-aws-ec2-metadata-token: AQAAAAB_____AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
const FORWARDED: &str = "X-Forwarded-For: 10.0.0.1";

const fn request(
    name: &'static str,
    line: &'static str,
    headers: &'static [&'static str],
) -> MetadataRequest {
    MetadataRequest {
        name,
        line,
        headers,
    }
}

/// Requests for a token.
pub(super) const TOKENS: [MetadataRequest; 14] = [
    request("PUT, TTL 300", PUT, &[TTL]),
    request("PUT without TTL", PUT, &[]),
    request("TTL 0", PUT, &["X-aws-ec2-metadata-token-ttl-seconds: 0"]),
    request(
        "TTL 21601",
        PUT,
        &["X-aws-ec2-metadata-token-ttl-seconds: 21601"],
    ),
    request(
        "TTL `1h`",
        PUT,
        &["X-aws-ec2-metadata-token-ttl-seconds: 1h"],
    ),
    request("TTL twice", PUT, &[TTL, TTL]),
    request("PUT, `X-Forwarded-For`", PUT, &[TTL, FORWARDED]),
    request("PUT, `Via`", PUT, &[TTL, "Via: 1.1 proxy"]),
    request("PUT, `Origin`", PUT, &[TTL, "Origin: http://a.example"]),
    request("PUT, another `Host`", PUT, &[TTL, "Host: a.example"]),
    request("PUT with a body", PUT, &[TTL, "Content-Length: 1"]),
    request("PUT, slash at the end", "PUT /latest/api/token/", &[TTL]),
    request("POST for a token", "POST /latest/api/token", &[TTL]),
    request("GET for a token", "GET /latest/api/token", &[TOKEN]),
];

/// Requests for credentials and other metadata.
pub(super) const METADATA: [MetadataRequest; 29] = [
    request("list", LIST, &[TOKEN]),
    request(
        "list, no slash at the end",
        "GET /latest/meta-data/iam/security-credentials",
        &[TOKEN],
    ),
    request(
        "list, each slash twice",
        "GET //latest//meta-data//iam//security-credentials//",
        &[TOKEN],
    ),
    request(
        "role",
        "GET /latest/meta-data/iam/security-credentials/{role}",
        &[TOKEN],
    ),
    request(
        "role, slash at the end",
        "GET /latest/meta-data/iam/security-credentials/{role}/",
        &[TOKEN],
    ),
    request(
        "role, with a query",
        "GET /latest/meta-data/iam/security-credentials/{role}?a=b",
        &[TOKEN],
    ),
    request(
        "unknown role",
        "GET /latest/meta-data/iam/security-credentials/unknown",
        &[TOKEN],
    ),
    request(
        "extended list",
        "GET /latest/meta-data/iam/security-credentials-extended/",
        &[TOKEN],
    ),
    request(
        "extended role",
        "GET /latest/meta-data/iam/security-credentials-extended/{role}",
        &[TOKEN],
    ),
    request("region", "GET /latest/meta-data/placement/region", &[TOKEN]),
    request(
        "zone",
        "GET /latest/meta-data/placement/availability-zone",
        &[TOKEN],
    ),
    request(
        "zone, slash at the end",
        "GET /latest/meta-data/placement/availability-zone/",
        &[TOKEN],
    ),
    request(
        "document",
        "GET /latest/dynamic/instance-identity/document",
        &[TOKEN],
    ),
    request("folder", "GET /latest/meta-data/", &[TOKEN]),
    request("instance ID", "GET /latest/meta-data/instance-id", &[TOKEN]),
    request("profile", "GET /latest/meta-data/iam/info", &[TOKEN]),
    request("user data", "GET /latest/user-data", &[TOKEN]),
    request("unknown path", "GET /latest/none", &[TOKEN]),
    request("list without token (version 1)", LIST, &[]),
    request(
        "instance ID without token",
        "GET /latest/meta-data/instance-id",
        &[],
    ),
    request("list, forged token", LIST, &[FORGED]),
    request(
        "list, expired token",
        LIST,
        &["X-aws-ec2-metadata-token: {expired}"],
    ),
    request("list, token twice", LIST, &[TOKEN, TOKEN]),
    request("list, `X-Forwarded-For`", LIST, &[TOKEN, FORWARDED]),
    request("list, another `Host`", LIST, &[TOKEN, "Host: a.example"]),
    request(
        "list, URL of a proxy's request",
        "GET http://{address}/latest/meta-data/iam/security-credentials/",
        &[TOKEN],
    ),
    request(
        "HEAD for the list",
        "HEAD /latest/meta-data/iam/security-credentials/",
        &[TOKEN],
    ),
    request(
        "POST to the list",
        "POST /latest/meta-data/iam/security-credentials/",
        &[TOKEN],
    ),
    request(
        "OPTIONS for the list",
        "OPTIONS /latest/meta-data/iam/security-credentials/",
        &[TOKEN],
    ),
];
