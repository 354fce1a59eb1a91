//! Temporary AWS credentials, and the JSON body of them that every SDK reads.

use std::fmt;
use std::io;
use std::time::SystemTime;

use serde::Serialize;
use zeroize::Zeroizing;

use crate::identity::{RoleArn, SessionName};

/// Credentials that STS issued for one role session.
#[derive(Clone)]
pub struct Credentials {
    /// The access key ID. It is not secret, and links the audit record to CloudTrail.
    pub access_key_id: String,
    /// The secret access key, which is zeroized.
    pub secret_access_key: Zeroizing<String>,
    /// The session token, which is zeroized.
    pub session_token: Zeroizing<String>,
    /// Time at which AWS stops accepting the credentials.
    pub expiration: SystemTime,
    /// Name of the first session, where AWS has not used the one that awsvid requested.
    pub first_session_name: Option<SessionName>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("access_key_id", &self.access_key_id)
            .field(
                "expiration",
                &humantime::format_rfc3339_seconds(self.expiration).to_string(),
            )
            .finish_non_exhaustive()
    }
}

/// The exact keys of the response. One SDK fails on unknown keys, another needs `Code`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct CredentialsBody<'a> {
    code: &'static str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    expiration: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<&'a str>,
    role_arn: &'a str,
}

impl Credentials {
    /// Renders the JSON body for SDKs. `Expiration` is in UTC with `Z` and whole seconds.
    /// `AccountId` is present only for the ARN of a role at AWS: an SDK has no use for accounts of
    /// another STS.
    pub fn body(&self, role: &RoleArn) -> RenderedBody {
        let body = CredentialsBody {
            code: "Success",
            access_key_id: &self.access_key_id,
            secret_access_key: &self.secret_access_key,
            token: &self.session_token,
            expiration: humantime::format_rfc3339_seconds(self.expiration).to_string(),
            account_id: role.account(),
            role_arn: role.as_str(),
        };
        // The buffer has the exact size, since a growing buffer would leave copies of the secrets.
        // The body has only strings, so its serialization into memory cannot fail.
        let mut length = LengthCounter(0);
        let _ = serde_json::to_writer(&mut length, &body);
        let mut bytes = Zeroizing::new(Vec::with_capacity(length.0));
        let _ = serde_json::to_writer(&mut *bytes, &body);
        RenderedBody::of(bytes)
    }
}

/// The JSON body of credentials. It is zeroized when it is dropped, and `Debug` does not print it.
pub struct RenderedBody {
    bytes: Zeroizing<Vec<u8>>,
    /// The end of the field `Expiration`.
    keys_end: usize,
    /// The end of the field `AccountId`, or `keys_end` without one.
    account_end: usize,
}

/// The begin of each body, before the fields that differ.
const BODY_HEAD: &[u8] = b"{\"Code\":\"Success\",";

impl RenderedBody {
    /// Returns a body without any bytes.
    pub fn empty() -> Self {
        Self {
            bytes: Zeroizing::default(),
            keys_end: 0,
            account_end: 0,
        }
    }

    fn of(bytes: Zeroizing<Vec<u8>>) -> Self {
        // A quotation mark within a value is escaped, so the name of a field occurs once.
        let find = |name: &[u8]| bytes.windows(name.len()).position(|part| part == name);
        let account_end = find(b",\"RoleArn\":\"").unwrap_or(bytes.len());
        let keys_end = find(b",\"AccountId\":\"").unwrap_or(account_end);
        Self {
            bytes,
            keys_end,
            account_end,
        }
    }

    /// Returns the whole body.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the fields from `AccessKeyId` to `Expiration`, which every protocol has.
    pub fn key_fields(&self) -> &[u8] {
        self.bytes
            .get(BODY_HEAD.len()..self.keys_end)
            .unwrap_or_default()
    }

    /// Returns the field `AccountId` with the comma before it; nothing for a role that is not at
    /// AWS.
    pub fn account_field(&self) -> &[u8] {
        self.bytes
            .get(self.keys_end..self.account_end)
            .unwrap_or_default()
    }
}

impl fmt::Debug for RenderedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RenderedBody({} bytes)", self.bytes.len())
    }
}

/// Writer that counts the bytes.
struct LengthCounter(usize);

impl io::Write for LengthCounter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn example() -> Credentials {
        Credentials {
            access_key_id: "ASIAEXAMPLE".to_owned(),
            secret_access_key: Zeroizing::new("s3cret/key".to_owned()),
            session_token: Zeroizing::new("t0ken==".to_owned()),
            expiration: SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_999),
            first_session_name: None,
        }
    }

    #[test]
    fn body_has_exactly_the_keys_that_sdks_read() {
        let role = RoleArn::parse("arn:aws:iam::123456789012:role/billing").unwrap();
        let body: serde_json::Value =
            serde_json::from_slice(example().body(&role).bytes()).unwrap();
        let expected = serde_json::json!({
            "Code": "Success", "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "s3cret/key", "Token": "t0ken==",
            "Expiration": "2027-01-15T08:00:00Z", "AccountId": "123456789012",
            "RoleArn": "arn:aws:iam::123456789012:role/billing",
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn body_has_no_account_id_for_a_role_that_is_not_at_aws() {
        for name in [
            "arn:minio:iam:::role/abcdef",
            "urn:ecs:iam::ns1:role/x",
            "arn:aws:iam::tenant:role/x",
            "x",
        ] {
            let role = RoleArn::opaque(name).unwrap();
            let body: serde_json::Value =
                serde_json::from_slice(example().body(&role).bytes()).unwrap();
            assert!(
                body.get("AccountId").is_none() && body["RoleArn"] == name,
                "{body}"
            );
        }
    }

    #[test]
    fn body_is_not_reallocated() {
        let role = RoleArn::parse("arn:aws:iam::123456789012:role/billing").unwrap();
        let long = Credentials {
            session_token: Zeroizing::new("t".repeat(1024)),
            ..example()
        };
        let body = long.body(&role).bytes;
        assert_eq!(body.capacity(), body.len());
        assert!(body.ends_with(b"}"));
    }

    #[test]
    fn parts_of_a_body_are_its_fields() {
        let evil = Credentials {
            session_token: Zeroizing::new("\",\"RoleArn\":\"\",\"AccountId\":\"".to_owned()),
            ..example()
        };
        for (name, account) in [
            ("arn:aws:iam::123456789012:role/billing", "123456789012"),
            ("arn:minio:iam:::role/abcdef", ""),
        ] {
            let body = evil.body(&RoleArn::opaque(name).unwrap());
            let text = [b"{", body.key_fields(), body.account_field(), b"}"].concat();
            let mut expected: serde_json::Value = serde_json::from_slice(body.bytes()).unwrap();
            let fields = expected.as_object_mut().unwrap();
            fields.remove("Code");
            fields.remove("RoleArn");
            assert_eq!(fields.contains_key("AccountId"), !account.is_empty());
            let found: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(found, expected);
            assert!(body.bytes().starts_with(BODY_HEAD));
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let text = format!("{:?}", example());
        assert!(text.contains("ASIAEXAMPLE"));
        let body = example().body(&RoleArn::opaque("x").unwrap());
        assert!(!format!("{body:?}").contains("s3cret"));
        assert!(
            !text.contains("s3cret") && !text.contains("t0ken"),
            "{text}"
        );
    }
}
