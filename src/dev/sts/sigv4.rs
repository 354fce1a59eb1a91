//! Verification of a request's Signature Version 4, by signing it again with AWS's own signer.

use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials as SigningCredentials;
use aws_sigv4::http_request::{
    SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign,
};
use aws_sigv4::sign::v4;
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::AUTHORIZATION;
use subtle::ConstantTimeEq;

use super::rejection::{Code, DevRejection};
use super::request::Parameters;
use super::sessions::{Session, Sessions};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SERVICE: &str = "sts";
/// Maximum difference between a request's time and this clock.
const MAX_SKEW: Duration = Duration::from_secs(15 * 60);
/// Maximum validity of a presigned request: a week, in seconds.
const MAX_EXPIRES: u64 = 604_800;
/// Query parameters that presigning adds. Signing again adds them again.
const PRESIGNED: [&str; 7] = [
    "X-Amz-Algorithm",
    "X-Amz-Credential",
    "X-Amz-Date",
    "X-Amz-Expires",
    "X-Amz-Security-Token",
    "X-Amz-Signature",
    "X-Amz-SignedHeaders",
];

/// Fields of a request's signature.
struct Signature {
    access_key_id: String,
    /// Date of the scope: `yyyymmdd`.
    date: String,
    region: String,
    service: String,
    signed_headers: Vec<String>,
    signature: String,
    /// Time of the signature: `yyyymmddThhmmssZ`.
    time_text: String,
    time: SystemTime,
    session_token: Option<String>,
    /// Validity of a presigned request.
    expires: Option<Duration>,
}

fn incomplete<T>(message: &str) -> Result<T, DevRejection> {
    Err(DevRejection::new(Code::IncompleteSignature, message))
}

fn mismatch<T>(message: impl Into<String>) -> Result<T, DevRejection> {
    Err(DevRejection::new(Code::SignatureDoesNotMatch, message))
}

/// Returns the session that signed a request, or the error of STS.
pub(super) fn authenticate(
    request: &Request<Bytes>,
    parameters: &Parameters,
    sessions: &Sessions,
    region: &str,
    now: SystemTime,
) -> Result<Session, DevRejection> {
    let signature = Signature::of(request, parameters)?;
    let unknown = || {
        DevRejection::new(
            Code::InvalidClientTokenId,
            "The security token included in the request is invalid.",
        )
    };
    let session = sessions
        .find(&signature.access_key_id)
        .ok_or_else(unknown)?;
    let token = signature
        .session_token
        .as_deref()
        .unwrap_or_default()
        .as_bytes();
    if !bool::from(token.ct_eq(session.credentials.session_token.as_bytes())) {
        return Err(unknown());
    }
    signature.check_scope(request, region, now)?;
    let again = signature.recompute(request, &session)?;
    if !bool::from(again.as_bytes().ct_eq(signature.signature.as_bytes())) {
        return mismatch(
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret \
             Access Key and signing method. Consult the service documentation for details.",
        );
    }
    if session.credentials.expiration <= now {
        return Err(DevRejection::new(
            Code::ExpiredToken,
            "The security token included in the request is expired",
        ));
    }
    Ok(session)
}

/// Returns a field of the header `Authorization`. `fields` is what follows the algorithm.
pub(super) fn authorization_field<'a>(fields: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = fields
        .split(',')
        .filter_map(|field| field.trim().split_once('='));
    fields
        .find(|(found, _)| *found == name)
        .map(|(_, value)| value)
}

impl Signature {
    fn of(request: &Request<Bytes>, parameters: &Parameters) -> Result<Self, DevRejection> {
        if parameters.get("X-Amz-Signature").is_some() {
            return Self::of_query(parameters);
        }
        match header(request, AUTHORIZATION.as_str()) {
            Some(authorization) => Self::of_header(request, authorization),
            None => Err(DevRejection::new(
                Code::MissingAuthenticationToken,
                "Request is missing Authentication Token",
            )),
        }
    }

    fn of_header(request: &Request<Bytes>, authorization: &str) -> Result<Self, DevRejection> {
        let Some(fields) = authorization.strip_prefix(ALGORITHM) else {
            return incomplete("Authorization does not use AWS4-HMAC-SHA256.");
        };
        let field = |name| authorization_field(fields, name);
        let (Some(credential), Some(headers), Some(signature)) = (
            field("Credential"),
            field("SignedHeaders"),
            field("Signature"),
        ) else {
            return incomplete(
                "Authorization header requires 'Credential', 'SignedHeaders' and 'Signature' parameters.",
            );
        };
        let Some(time) = header(request, "x-amz-date") else {
            return incomplete(
                "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header.",
            );
        };
        let token = header(request, "x-amz-security-token").map(str::to_owned);
        Self::new(credential, headers, signature, time, token, None)
    }

    fn of_query(parameters: &Parameters) -> Result<Self, DevRejection> {
        let [algorithm, credential, date, expires, _, signature, headers] =
            PRESIGNED.map(|name| parameters.get(name));
        let (
            Some(ALGORITHM),
            Some(credential),
            Some(time),
            Some(expires),
            Some(signature),
            Some(headers),
        ) = (algorithm, credential, date, expires, signature, headers)
        else {
            return incomplete("The X-Amz-* query parameters of the signature are not complete.");
        };
        let Some(expires) = expires
            .parse()
            .ok()
            .filter(|seconds| *seconds <= MAX_EXPIRES)
        else {
            return incomplete("X-Amz-Expires must be a number of seconds, 604800 at most.");
        };
        let token = parameters.get("X-Amz-Security-Token").map(str::to_owned);
        Self::new(
            credential,
            headers,
            signature,
            time,
            token,
            Some(Duration::from_secs(expires)),
        )
    }

    fn new(
        credential: &str,
        headers: &str,
        signature: &str,
        time_text: &str,
        session_token: Option<String>,
        expires: Option<Duration>,
    ) -> Result<Self, DevRejection> {
        let scope: Vec<&str> = credential.split('/').collect();
        let [access_key_id, date, region, service, "aws4_request"] = scope[..] else {
            return incomplete(
                "Credential must have 5 parts, as in ASIA.../20260101/us-east-1/sts/aws4_request.",
            );
        };
        let Some(time) = parse_amz_date(time_text) else {
            return incomplete("X-Amz-Date must be a time in UTC, as in 20260101T000000Z.");
        };
        Ok(Self {
            access_key_id: access_key_id.to_owned(),
            date: date.to_owned(),
            region: region.to_owned(),
            service: service.to_owned(),
            signed_headers: headers.split(';').map(str::to_owned).collect(),
            signature: signature.to_owned(),
            time_text: time_text.to_owned(),
            time,
            session_token,
            expires,
        })
    }

    /// Checks the signed headers, and the time and region of the signature.
    fn check_scope(
        &self,
        request: &Request<Bytes>,
        region: &str,
        now: SystemTime,
    ) -> Result<(), DevRejection> {
        if self.region != region {
            return mismatch("Credential should be scoped to a valid region.");
        }
        if self.service != SERVICE {
            return mismatch("Credential should be scoped to correct service: 'sts'.");
        }
        if !self.time_text.starts_with(&self.date) {
            return mismatch(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP",
            );
        }
        // Headers that the signature does not cover could be changed on the way.
        let is_signed = |name: &str| self.signed_headers.iter().any(|signed| signed == name);
        let mut must = request
            .headers()
            .keys()
            .map(|name| name.as_str())
            .filter(|name| name.starts_with("x-amz-"));
        if !is_signed("host") || must.any(|name| !is_signed(name)) {
            return mismatch(
                "'Host' and all 'x-amz-*' headers must be 'SignedHeaders' in the AWS Authorization.",
            );
        }
        let valid_for = self.expires.unwrap_or(MAX_SKEW);
        if now > self.time + valid_for {
            return mismatch(format!(
                "Signature expired: {} is more than {valid_for:?} ago",
                self.time_text
            ));
        }
        if self.time > now + MAX_SKEW {
            return mismatch(format!(
                "Signature not yet current: {} is still later than now",
                self.time_text
            ));
        }
        Ok(())
    }

    /// Computes the signature of this request with the session's secret key.
    fn recompute(
        &self,
        request: &Request<Bytes>,
        session: &Session,
    ) -> Result<String, DevRejection> {
        let credentials = &session.credentials;
        let identity = SigningCredentials::new(
            credentials.access_key_id.as_str(),
            credentials.secret_access_key.as_str(),
            Some(credentials.session_token.to_string()),
            None,
            "dev",
        )
        .into();
        let mut settings = SigningSettings::default();
        // The client lists the headers that it signed. All of them count.
        settings.excluded_headers = None;
        if self.expires.is_some() {
            settings.signature_location = SignatureLocation::QueryParams;
            settings.expires_in = self.expires;
        }
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(SERVICE)
            .time(self.time)
            .settings(settings)
            .build()
            .map_err(|error| DevRejection::internal(&error))?
            .into();
        let headers = self.signed_headers.iter().flat_map(|name| {
            let values = request.headers().get_all(name.as_str()).iter();
            values.filter_map(move |value| Some((name.as_str(), value.to_str().ok()?)))
        });
        let uri = self.unsigned_uri(request);
        let signable = SignableRequest::new(
            request.method().as_str(),
            uri,
            headers,
            SignableBody::Bytes(request.body()),
        );
        let Ok(signed) = signable.and_then(|signable| sign(signable, &parameters)) else {
            return incomplete("The request cannot be signed.");
        };
        Ok(signed.into_parts().1)
    }

    /// Returns the request's URI before it was signed. The host is signed as a header.
    fn unsigned_uri(&self, request: &Request<Bytes>) -> String {
        let uri = request.uri();
        let is_added = |pair: &&str| {
            let name = pair.split('=').next().unwrap_or_default();
            self.expires.is_some() && PRESIGNED.contains(&name)
        };
        let query: Vec<&str> = uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !is_added(pair))
            .collect();
        format!("http://127.0.0.1{}?{}", uri.path(), query.join("&"))
    }
}

fn header<'a>(request: &'a Request<Bytes>, name: &str) -> Option<&'a str> {
    request
        .headers()
        .get(name)
        .and_then(|value| value.to_str().ok())
}

/// Parses a time such as `20260101T120000Z`.
fn parse_amz_date(text: &str) -> Option<SystemTime> {
    if text.len() != 16 || !text.is_ascii() {
        return None;
    }
    let (date, time) = text.split_once('T')?;
    let extended = format!(
        "{}-{}-{}T{}:{}:{}",
        date.get(..4)?,
        date.get(4..6)?,
        date.get(6..)?,
        time.get(..2)?,
        time.get(2..4)?,
        time.get(4..)?
    );
    humantime::parse_rfc3339(&extended).ok()
}
