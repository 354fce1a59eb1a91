//! The reasons of the differences, which the document has.

/// Each reason with the names of its rows.
const REASONS: [(&str, &[&str]); 30] = [
    (
        "awsvid's token is as long as EC2's and needs no memory; the others store random ones",
        &["PUT, TTL 300"],
    ),
    (
        "EC2 requires the header; the helper takes six hours instead",
        &["PUT without TTL"],
    ),
    (
        "the status is the same; awsvid's body has the cause and the fix",
        &[
            "TTL 0",
            "TTL 21601",
            "TTL `1h`",
            "unknown path",
            "list without token (version 1)",
            "list, forged token",
            "list, expired token",
        ],
    ),
    (
        "two values are ambiguous; the others take the first",
        &["TTL twice", "list, token twice"],
    ),
    (
        "a proxy would fetch its own credentials for its clients; EC2's status for it is 403",
        &["PUT, `X-Forwarded-For`", "PUT, `Via`"],
    ),
    (
        "a page in a browser must not get a token",
        &["PUT, `Origin`"],
    ),
    (
        "after DNS rebinding a browser sends the name of its page",
        &["PUT, another `Host`", "list, another `Host`"],
    ),
    ("SDKs send none, so it is not an SDK", &["PUT with a body"]),
    (
        "awsvid ignores one slash at the end of every path",
        &["PUT, slash at the end", "role, slash at the end"],
    ),
    (
        "only PUT has a meaning there; awsvid names it in `Allow`",
        &["POST for a token", "GET for a token"],
    ),
    (
        "like EC2, awsvid sends the remaining lifetime with each answer; the mock does not",
        &["list"],
    ),
    (
        "a redirect costs a request, and not every SDK follows it",
        &["list, no slash at the end", "list, each slash twice"],
    ),
    (
        "the body is JSON, and EC2's dates have no fractions",
        &["role"],
    ),
    (
        "SDKs send none; awsvid serves each resource at one path",
        &["role, with a query"],
    ),
    (
        "a role of another workload and one that does not exist get one answer; the helper lists its role",
        &["unknown role"],
    ),
    (
        "newer SDKs try this path first, for the account ID",
        &["extended list", "extended role"],
    ),
    (
        "SDKs without a region of their own read it there; the helper serves credentials alone",
        &["region", "zone", "zone, slash at the end"],
    ),
    (
        "a workload has only the region; the mock invents an instance",
        &["document"],
    ),
    (
        "a workload is not an EC2 instance, and agents take a node that answers for one",
        &["folder", "instance ID", "profile", "user data"],
    ),
    (
        "without a token a caller does not learn which paths exist",
        &["instance ID without token"],
    ),
    (
        "as for PUT: a proxy would fetch its own credentials for its clients",
        &["list, `X-Forwarded-For`", "list, URL of a proxy's request"],
    ),
    (
        "SDKs send only GET; OPTIONS is a browser's",
        &[
            "HEAD for the list",
            "POST to the list",
            "OPTIONS for the list",
        ],
    ),
    (
        "the others leave it out where the body is empty",
        &["content-type"],
    ),
    (
        "Go's library adds `utf-8` by itself; EC2 sends none",
        &["charset in content-type"],
    ),
    ("Go's server leaves it out after HEAD", &["content-length"]),
    ("a cache must not store credentials", &["cache-control"]),
    (
        "`close`: awsvid attests the caller of one connection for one request",
        &["connection"],
    ),
    ("RFC 9110 requires it with a 405", &["allow"]),
    ("awsvid does not redirect", &["location"]),
    (
        "for browsers, which awsvid rejects",
        &["x-content-type-options"],
    ),
];

/// Returns the reason why the servers differ in this row. Rows without a difference have none.
pub(super) fn reason(name: &str) -> Option<&'static str> {
    let found = REASONS.iter().find(|(_, names)| names.contains(&name));
    found.map(|(reason, _)| *reason)
}
