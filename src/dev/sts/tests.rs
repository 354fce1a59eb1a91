use super::*;

use std::time::{SystemTime, UNIX_EPOCH};

use aws_credential_types::Credentials as SigningCredentials;
use aws_sdk_sts::config::{BehaviorVersion, Config, Region, SharedCredentialsProvider};
use aws_sdk_sts::error::ProvideErrorMetadata;
use aws_sigv4::http_request::{
    SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign,
};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::dev::keys::SigningKey;
use crate::dev::oidc::DevOidcIssuer;

pub(super) const ROLE: &str = "arn:aws:iam::000000000000:role/dev";
const SUBJECT: &str = "spiffe://dev.local/user/alice";
const AUDIENCE: &str = "dev-sts";

/// Names and values, of headers or of a query.
type Pairs = Vec<(String, String)>;

pub(super) struct DevStsEnv {
    key: SigningKey,
    issuer: DevOidcIssuer,
    sts: DevSts,
}

pub(super) async fn env() -> DevStsEnv {
    let key = SigningKey::generate().unwrap();
    let issuer = DevOidcIssuer::start(key.jwks()).await.unwrap();
    let role = |name: &str, hours: u64| TrustedRole {
        arn: RoleArn::parse(&format!("arn:aws:iam::000000000000:role/{name}")).unwrap(),
        issuer: issuer.url().to_owned(),
        audience: AUDIENCE.to_owned(),
        subjects: vec![SpiffeIdPattern::parse("spiffe://dev.local/user/*").unwrap()],
        max_duration: Duration::from_secs(hours * 3600),
    };
    let account = DevAccount {
        region: "us-east-1".to_owned(),
        providers: vec![DevProvider {
            issuer: issuer.url().to_owned(),
            client_ids: vec![AUDIENCE.to_owned(), "other-role".to_owned()],
        }],
        roles: vec![role("dev", 12), role("short", 1)],
        trust_anchors: Vec::new(),
        chained: chained::tests::trusts(),
    };
    let sts = DevSts::start(account, Clock::system()).await.unwrap();
    DevStsEnv { key, issuer, sts }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

impl DevStsEnv {
    fn claims(&self) -> Value {
        json!({ "iss": self.issuer.url(), "sub": SUBJECT, "aud": [AUDIENCE], "iat": now(), "exp": now() + 300 })
    }

    /// Returns a valid token with these changes of claims. A null removes a claim.
    fn token(&self, changes: Value) -> String {
        let mut claims = self.claims();
        let members = claims.as_object_mut().unwrap();
        for (name, value) in changes.as_object().unwrap() {
            members.insert(name.clone(), value.clone());
        }
        members.retain(|_, value| !value.is_null());
        self.key.sign(&claims).unwrap()
    }

    async fn assume(&self, changes: &[(&str, &str)]) -> DevStsReply {
        let token = self.token(json!({}));
        let mut parameters = vec![
            ("Action", "AssumeRoleWithWebIdentity"),
            ("Version", "2011-06-15"),
            ("RoleArn", ROLE),
            ("RoleSessionName", "alice"),
            ("WebIdentityToken", &token),
        ];
        parameters.retain(|(name, _)| changes.iter().all(|(changed, _)| changed != name));
        parameters.extend(changes.iter().filter(|(_, value)| !value.is_empty()));
        let form = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(parameters)
            .finish();
        self.post(
            &[("content-type", "application/x-www-form-urlencoded")],
            &form,
        )
        .await
    }

    async fn with_token(&self, token: &str) -> DevStsReply {
        self.assume(&[("WebIdentityToken", token)]).await
    }

    async fn post(&self, headers: &[(&str, &str)], body: &str) -> DevStsReply {
        self.send("POST", "/", headers, body).await
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> DevStsReply {
        let host = self.sts.url().trim_start_matches("http://");
        let headers: String = headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
        );
        let mut stream = TcpStream::connect(host).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        DevStsReply {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            body: body.to_owned(),
        }
    }

    pub(super) fn client(&self, credentials: Option<SigningCredentials>) -> aws_sdk_sts::Client {
        let http: SharedHttpClient = aws_smithy_http_client::Builder::new().build_http();
        let mut config = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new("us-east-1"))
            .endpoint_url(self.sts.url())
            .http_client(http);
        config.set_credentials_provider(credentials.map(SharedCredentialsProvider::new));
        aws_sdk_sts::Client::from_conf(config.build())
    }

    /// Returns the session with this access key.
    pub(super) fn sts_session(&self, access_key_id: &str) -> sessions::Session {
        self.sts.state.sessions.find(access_key_id).unwrap()
    }

    pub(super) fn session(&self, expires_in: i64) -> SigningCredentials {
        let role = RoleArn::parse(ROLE).unwrap();
        let name = SessionName::parse("alice").unwrap();
        let caller = self.sts.state.caller(&role, &name);
        let issued_at =
            UNIX_EPOCH + Duration::from_secs(now().checked_add_signed(expires_in - 900).unwrap());
        let issued = self
            .sts
            .state
            .sessions
            .issue(
                caller,
                SessionFacts::of(&role),
                issued_at,
                Duration::from_secs(900),
            )
            .unwrap()
            .credentials;
        let token = Some(issued.session_token.to_string());
        SigningCredentials::new(
            issued.access_key_id,
            issued.secret_access_key.as_str(),
            token,
            None,
            "test",
        )
    }
}

#[derive(Debug)]
struct DevStsReply {
    status: u16,
    body: String,
}

impl DevStsReply {
    fn element(&self, name: &str) -> &str {
        let after = self
            .body
            .split_once(&format!("<{name}>"))
            .map_or("", |(_, after)| after);
        after.split_once("</").map_or("", |(text, _)| text)
    }

    #[track_caller]
    fn rejected(&self, status: u16, code: &str, message: &str) {
        assert_eq!(
            (self.status, self.element("Code")),
            (status, code),
            "{}",
            self.body
        );
        assert!(self.element("Message").contains(message), "{}", self.body);
    }
}

#[tokio::test]
async fn valid_token_gives_a_session_with_working_credentials() {
    let env = env().await;
    let assumed = env
        .client(None)
        .assume_role_with_web_identity()
        .role_arn(ROLE)
        .role_session_name("dev.local=user=alice")
        .duration_seconds(1800)
        .web_identity_token(env.token(json!({})))
        .send()
        .await
        .unwrap();
    assert_eq!(assumed.subject_from_web_identity_token(), Some(SUBJECT));
    assert_eq!(assumed.audience(), Some(AUDIENCE));
    assert_eq!(assumed.provider(), Some(env.issuer.url()));
    let user = assumed.assumed_role_user().unwrap();
    assert_eq!(
        user.arn(),
        "arn:aws:sts::000000000000:assumed-role/dev/dev.local=user=alice"
    );
    let issued = assumed.credentials().unwrap();
    assert!(issued.access_key_id().starts_with("ASIA") && issued.access_key_id().len() == 20);
    let left = issued.expiration().secs() - i64::try_from(now()).unwrap();
    assert!((1790..=1800).contains(&left), "{left}");

    let credentials = SigningCredentials::new(
        issued.access_key_id(),
        issued.secret_access_key(),
        Some(issued.session_token().to_owned()),
        None,
        "test",
    );
    let identity = env
        .client(Some(credentials))
        .get_caller_identity()
        .send()
        .await
        .unwrap();
    assert_eq!(identity.arn(), Some(user.arn()));
    assert_eq!(identity.account(), Some("000000000000"));
    assert_eq!(identity.user_id(), Some(user.assumed_role_id()));
    assert_eq!(env.sts.issued(), 1);
}

#[tokio::test]
async fn sdk_parses_the_errors_as_those_of_sts() {
    let env = env().await;
    let expired = env.token(json!({ "iat": now() - 600, "exp": now() - 1 }));
    let request = env
        .client(None)
        .assume_role_with_web_identity()
        .role_arn(ROLE)
        .role_session_name("alice");
    let error = request
        .clone()
        .web_identity_token(expired)
        .send()
        .await
        .unwrap_err()
        .into_service_error();
    assert!(error.is_expired_token_exception(), "{error:?}");
    let foreign = env.token(json!({ "aud": ["sts.amazonaws.com"] }));
    let error = request
        .clone()
        .web_identity_token(foreign)
        .send()
        .await
        .unwrap_err()
        .into_service_error();
    assert!(error.is_invalid_identity_token_exception(), "{error:?}");
    let error = request
        .policy("{")
        .web_identity_token(env.token(json!({})))
        .send()
        .await
        .unwrap_err();
    assert!(
        error
            .into_service_error()
            .is_malformed_policy_document_exception()
    );

    let mut wrong = env.session(600);
    wrong = SigningCredentials::new(
        wrong.access_key_id(),
        "another secret",
        wrong.session_token().map(str::to_owned),
        None,
        "test",
    );
    let error = env
        .client(Some(wrong))
        .get_caller_identity()
        .send()
        .await
        .unwrap_err()
        .into_service_error();
    assert_eq!(error.code(), Some("SignatureDoesNotMatch"));
}

#[tokio::test]
async fn tokens_with_invalid_claims_are_rejected() {
    let env = env().await;
    let identity = "InvalidIdentityToken";
    let denied = "Not authorized to perform sts:AssumeRoleWithWebIdentity";
    let table = [
        (
            json!({ "iss": "http://127.0.0.1:1" }),
            400,
            identity,
            "No OpenIDConnect provider found in your account for",
        ),
        (json!({ "iss": null }), 400, identity, "claim: iss"),
        (
            json!({ "aud": ["sts.amazonaws.com"] }),
            400,
            identity,
            "Incorrect token audience",
        ),
        (
            json!({ "aud": [AUDIENCE, "second"] }),
            400,
            identity,
            "more than one audience",
        ),
        (
            json!({ "aud": [AUDIENCE], "azp": "second" }),
            400,
            identity,
            "Incorrect token audience",
        ),
        (json!({ "aud": [] }), 400, identity, "claim: aud"),
        (json!({ "aud": null }), 400, identity, "claim: aud"),
        (
            json!({ "aud": ["other-role"] }),
            403,
            "AccessDenied",
            denied,
        ),
        (
            json!({ "sub": "spiffe://dev.local/host/alice" }),
            403,
            "AccessDenied",
            denied,
        ),
        (
            json!({ "sub": "spiffe://other.local/user/alice" }),
            403,
            "AccessDenied",
            denied,
        ),
        (json!({ "sub": "alice" }), 403, "AccessDenied", denied),
        (json!({ "sub": null }), 400, identity, "claim: sub"),
        (
            json!({ "exp": now() - 1 }),
            400,
            "ExpiredTokenException",
            "Token expired: current date/time",
        ),
        (json!({ "exp": null }), 400, identity, "claim: exp"),
        (json!({ "exp": 1.9e9 }), 400, identity, "Invalid timestamp"),
        (json!({ "iat": 1.7e9 }), 400, identity, "Invalid timestamp"),
        (json!({ "iat": null }), 400, identity, "claim: iat"),
        (
            json!({ "iat": now() + 3600, "exp": now() + 7200 }),
            400,
            identity,
            "not yet valid",
        ),
        (
            json!({ "nbf": now() + 3600, "exp": now() + 7200 }),
            400,
            identity,
            "not yet valid",
        ),
    ];
    for (changes, status, code, message) in table {
        env.with_token(&env.token(changes))
            .await
            .rejected(status, code, message);
    }
    for good in [
        json!({ "aud": AUDIENCE }),
        json!({ "aud": ["second", AUDIENCE], "azp": AUDIENCE }),
    ] {
        assert_eq!(env.with_token(&env.token(good)).await.status, 200);
    }
}

#[tokio::test]
async fn tokens_of_other_keys_are_rejected() {
    let env = env().await;
    let identity = "InvalidIdentityToken";
    let good = env.token(json!({}));
    let [header, claims, signature] = good.split('.').collect::<Vec<_>>()[..] else {
        panic!("{good}")
    };

    let other = SigningKey::generate().unwrap();
    let foreign = other.sign(&env.claims()).unwrap();
    env.with_token(&foreign)
        .await
        .rejected(400, identity, "Couldn't retrieve verification key");

    // Another key under the issuer's key id.
    let pkcs8 = aws_lc_rs::signature::EcdsaKeyPair::generate_pkcs8(
        &aws_lc_rs::signature::ECDSA_P256_SHA256_FIXED_SIGNING,
        &aws_lc_rs::rand::SystemRandom::new(),
    )
    .unwrap();
    let mut named = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    named.kid = Some(env.key.kid().to_owned());
    let key = jsonwebtoken::EncodingKey::from_ec_der(pkcs8.as_ref());
    let forged = jsonwebtoken::encode(&named, &env.claims(), &key).unwrap();
    env.with_token(&forged)
        .await
        .rejected(400, identity, "signature");

    let mut changed = env.claims();
    changed["sub"] = json!("spiffe://dev.local/user/root");
    let changed = URL_SAFE_NO_PAD.encode(changed.to_string());
    env.with_token(&format!("{header}.{changed}.{signature}"))
        .await
        .rejected(400, identity, "signature");
    env.with_token(&format!("{header}.{claims}."))
        .await
        .rejected(400, identity, "signature");

    // The public key as the secret of a symmetric algorithm, and no algorithm at all.
    named.alg = jsonwebtoken::Algorithm::HS256;
    let public = jsonwebtoken::EncodingKey::from_secret(env.key.jwks().as_bytes());
    let confused = jsonwebtoken::encode(&named, &env.claims(), &public).unwrap();
    env.with_token(&confused)
        .await
        .rejected(400, identity, "algorithm");
    let none = URL_SAFE_NO_PAD.encode(json!({ "alg": "none", "kid": env.key.kid() }).to_string());
    env.with_token(&format!("{none}.{claims}."))
        .await
        .rejected(400, identity, "not a valid JWT");
    env.with_token("not-a-token")
        .await
        .rejected(400, identity, "not a valid JWT");
}

#[tokio::test]
async fn silent_or_different_issuer_is_rejected() {
    let DevStsEnv { key, issuer, sts } = env().await;
    let verify = async |account: &DevAccount| {
        let iss = &account.providers[0].issuer;
        let claims = json!({ "iss": iss, "sub": SUBJECT, "aud": [AUDIENCE], "iat": now(), "exp": now() + 300 });
        token::verify(&key.sign(&claims).unwrap(), account, SystemTime::now()).await
    };
    let mut account = sts.state.account.clone();
    assert!(verify(&account).await.is_ok());

    // A discovery document of another issuer at the URL of the configured one.
    let (listener, address) = loopback_http::bind().await.unwrap();
    let document = loopback_http::get(&format!(
        "{}/.well-known/openid-configuration",
        issuer.url()
    ))
    .await
    .unwrap();
    let _server = Server::start(listener, move |_| {
        let document = document.clone();
        async move { LoopbackResponse::new(document.into()) }
    });
    account.providers[0].issuer = format!("http://{address}");
    let rejected = verify(&account).await.unwrap_err();
    assert!(
        format!("{rejected:?}").contains("Couldn't retrieve verification key"),
        "{rejected:?}"
    );

    drop(issuer);
    let rejected = verify(&sts.state.account).await.unwrap_err();
    assert!(
        format!("{rejected:?}").contains("Couldn't retrieve verification key"),
        "{rejected:?}"
    );
}

#[tokio::test]
async fn role_trusts_only_its_own_issuer() {
    let DevStsEnv { sts, .. } = env().await;
    let DevStsEnv { key, issuer, .. } = env().await;
    let mut account = sts.state.account.clone();
    account.providers.push(DevProvider {
        issuer: issuer.url().to_owned(),
        client_ids: vec![AUDIENCE.to_owned()],
    });
    let sts = DevSts::start(account, Clock::system()).await.unwrap();
    // The account has the second issuer, and its token is valid.
    let other = DevStsEnv { key, issuer, sts };
    other
        .with_token(&other.token(json!({})))
        .await
        .rejected(403, "AccessDenied", "Not authorized");
}

#[tokio::test]
async fn parameters_out_of_bounds_are_rejected() {
    let env = env().await;
    let validation = "ValidationError";
    let long = "x".repeat(20_001);
    let table = [
        (vec![("RoleArn", "")], 400, validation, "'roleArn'"),
        (
            vec![("RoleArn", "arn:aws:iam::0:role/dev")],
            400,
            validation,
            "is invalid",
        ),
        (
            vec![("RoleArn", "arn:aws:iam::000000000000:role/other")],
            403,
            "AccessDenied",
            "Not authorized",
        ),
        (
            vec![("RoleArn", "arn:aws:iam::123456789012:role/dev")],
            403,
            "AccessDenied",
            "Not authorized",
        ),
        (
            vec![("RoleSessionName", "")],
            400,
            validation,
            "Value null at 'roleSessionName'",
        ),
        (
            vec![("RoleSessionName", "a")],
            400,
            validation,
            "greater than or equal to 2",
        ),
        (
            vec![("RoleSessionName", "with/slash")],
            400,
            validation,
            "regular expression pattern",
        ),
        (
            vec![("RoleSessionName", "<&>\u{1}")],
            400,
            validation,
            "'&lt;&amp;&gt;\u{fffd}'",
        ),
        (
            vec![("RoleSessionName", &long[..65])],
            400,
            validation,
            "less than or equal to 64",
        ),
        (
            vec![("DurationSeconds", "899")],
            400,
            validation,
            "greater than or equal to 900",
        ),
        (
            vec![("DurationSeconds", "43201")],
            400,
            validation,
            "less than or equal to 43200",
        ),
        (
            vec![("DurationSeconds", "1h")],
            400,
            validation,
            "'1h' at 'durationSeconds'",
        ),
        (
            vec![
                ("DurationSeconds", "7200"),
                ("RoleArn", "arn:aws:iam::000000000000:role/short"),
            ],
            400,
            validation,
            "exceeds the MaxSessionDuration",
        ),
        (
            vec![("WebIdentityToken", "")],
            400,
            validation,
            "Value null at 'webIdentityToken'",
        ),
        (
            vec![("WebIdentityToken", &long)],
            400,
            validation,
            "less than or equal to 20000",
        ),
        (
            vec![("ProviderId", "www.amazon.com")],
            400,
            validation,
            "ProviderId",
        ),
        (
            vec![("Policy", "not json")],
            400,
            "MalformedPolicyDocument",
            "JSON",
        ),
        (vec![("Policy", &long[..2049])], 400, validation, "'policy'"),
        (
            vec![("PolicyArns.member.1.arn", "ReadOnly")],
            400,
            validation,
            "not valid",
        ),
        (
            vec![("Action", "AssumeRoleWithSAML")],
            400,
            "InvalidAction",
            "AssumeRoleWithSAML for version 2011-06-15",
        ),
        (
            vec![("Version", "")],
            400,
            "InvalidAction",
            "NO_VERSION_SPECIFIED",
        ),
    ];
    for (changes, status, code, message) in table {
        env.assume(&changes).await.rejected(status, code, message);
    }
    let narrowed = env
        .assume(&[
            ("Policy", r#"{"Version":"2012-10-17","Statement":[]}"#),
            ("DurationSeconds", "43200"),
        ])
        .await;
    assert_eq!(narrowed.status, 200, "{narrowed:?}");
}

#[tokio::test]
async fn oversized_body_is_not_read() {
    let env = env().await;
    let mut stream = TcpStream::connect(env.sts.url().trim_start_matches("http://"))
        .await
        .unwrap();
    stream
        .write_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        .await
        .unwrap();
    // Writes until the server answers or closes the connection.
    while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply).await;
    assert!(
        reply.is_empty() || reply.starts_with(b"HTTP/1.1 413 "),
        "{}",
        String::from_utf8_lossy(&reply)
    );
    assert_eq!(env.assume(&[]).await.status, 200);
}

const FORM: &str = "Action=GetCallerIdentity&Version=2011-06-15";

/// A request for `GetCallerIdentity`, which a test modifies before it is sent.
struct SignedRequest {
    method: &'static str,
    path: String,
    headers: Vec<(String, String)>,
    body: &'static str,
}

impl SignedRequest {
    fn new(
        env: &DevStsEnv,
        credentials: &SigningCredentials,
        time: SystemTime,
        region: &str,
    ) -> Self {
        let mut settings = SigningSettings::default();
        settings.excluded_headers = None;
        let path = "/".to_owned();
        let mut signed = Self {
            method: "POST",
            path,
            headers: vec![],
            body: FORM,
        };
        let content = (
            "content-type".to_owned(),
            "application/x-www-form-urlencoded".to_owned(),
        );
        signed.headers = vec![content];
        let (headers, _) = signed.sign(env, credentials, time, region, settings);
        signed.headers.extend(headers);
        signed
    }

    fn presigned(
        env: &DevStsEnv,
        credentials: &SigningCredentials,
        time: SystemTime,
        valid_for: Duration,
    ) -> Self {
        let mut settings = SigningSettings::default();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(valid_for);
        let mut signed = Self {
            method: "GET",
            path: format!("/?{FORM}"),
            headers: vec![],
            body: "",
        };
        let (_, added) = signed.sign(env, credentials, time, "us-east-1", settings);
        let added = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(added)
            .finish();
        signed.path = format!("{}&{added}", signed.path);
        signed
    }

    fn sign(
        &self,
        env: &DevStsEnv,
        credentials: &SigningCredentials,
        time: SystemTime,
        region: &str,
        settings: SigningSettings,
    ) -> (Pairs, Pairs) {
        let identity = credentials.clone().into();
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region(region)
            .name("sts")
            .time(time)
            .settings(settings)
            .build()
            .unwrap()
            .into();
        let url = format!("{}{}", env.sts.url(), self.path);
        let headers = self
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let request = SignableRequest::new(
            self.method,
            url,
            headers,
            SignableBody::Bytes(self.body.as_bytes()),
        );
        let (signed, _) = sign(request.unwrap(), &parameters).unwrap().into_parts();
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let headers = signed.headers().map(owned).collect();
        let query = signed
            .params()
            .iter()
            .map(|(name, value)| owned((name, value.as_ref())))
            .collect();
        (headers, query)
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(found, _)| found != name);
        self
    }

    fn with(self, name: &str, value: &str) -> Self {
        let mut signed = self.without(name);
        signed.headers.push((name.to_owned(), value.to_owned()));
        signed
    }

    fn replacing(mut self, from: &str, to: &str) -> Self {
        self.path = self.path.replace(from, to);
        for (_, value) in &mut self.headers {
            *value = value.replace(from, to);
        }
        self
    }

    async fn send(&self, env: &DevStsEnv) -> DevStsReply {
        let headers: Vec<_> = self
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        env.send(self.method, &self.path, &headers, self.body).await
    }
}

#[tokio::test]
async fn requests_with_invalid_signatures_are_rejected() {
    let env = env().await;
    let alice = env.session(600);
    let bob = env.session(600);
    let time = SystemTime::now();
    let signed = || SignedRequest::new(&env, &alice, time, "us-east-1");
    let good = signed().send(&env).await;
    assert_eq!(
        (good.status, good.element("Account")),
        (200, "000000000000"),
        "{good:?}"
    );

    let mismatch = "SignatureDoesNotMatch";
    let unknown = "InvalidClientTokenId";
    let mut other_body = signed();
    other_body.body = "Action=GetCallerIdentity&Version=2011-06-15&x=y";
    let long_ago = time - Duration::from_secs(16 * 60);
    let ahead = time + Duration::from_secs(16 * 60);
    let table = [
        (
            other_body,
            403,
            mismatch,
            "does not match the signature you provided",
        ),
        (
            signed().with(
                "content-type",
                "application/x-www-form-urlencoded; charset=utf-8",
            ),
            403,
            mismatch,
            "",
        ),
        (
            signed().with("x-amz-user-agent", "added"),
            403,
            mismatch,
            "SignedHeaders",
        ),
        (
            signed().replacing(
                "SignedHeaders=content-type;host;",
                "SignedHeaders=content-type;",
            ),
            403,
            mismatch,
            "'Host'",
        ),
        (
            signed().replacing("/us-east-1/", "/eu-west-1/"),
            403,
            mismatch,
            "valid region",
        ),
        (
            signed().replacing("/sts/", "/s3/"),
            403,
            mismatch,
            "correct service",
        ),
        (
            SignedRequest::new(&env, &alice, time, "eu-west-1"),
            403,
            mismatch,
            "valid region",
        ),
        (
            SignedRequest::new(&env, &alice, long_ago, "us-east-1"),
            403,
            mismatch,
            "Signature expired",
        ),
        (
            SignedRequest::new(&env, &alice, ahead, "us-east-1"),
            403,
            mismatch,
            "not yet current",
        ),
        (
            signed().replacing(alice.access_key_id(), bob.access_key_id()),
            403,
            unknown,
            "invalid",
        ),
        (
            signed().replacing(alice.access_key_id(), "ASIAAAAAAAAAAAAAAAAA"),
            403,
            unknown,
            "invalid",
        ),
        (
            signed().with("x-amz-security-token", bob.session_token().unwrap()),
            403,
            unknown,
            "invalid",
        ),
        (
            signed().without("x-amz-security-token"),
            403,
            unknown,
            "invalid",
        ),
        (
            signed().without("authorization"),
            403,
            "MissingAuthenticationToken",
            "",
        ),
        (
            signed().without("x-amz-date"),
            400,
            "IncompleteSignature",
            "",
        ),
        (
            signed().with("x-amz-date", "yesterday"),
            400,
            "IncompleteSignature",
            "",
        ),
        (
            signed().with("authorization", "Bearer x"),
            400,
            "IncompleteSignature",
            "",
        ),
        (
            signed().with("authorization", "AWS4-HMAC-SHA256 Credential=x"),
            400,
            "IncompleteSignature",
            "",
        ),
        (
            signed().replacing("/aws4_request", ""),
            400,
            "IncompleteSignature",
            "",
        ),
    ];
    for (request, status, code, message) in table {
        request.send(&env).await.rejected(status, code, message);
    }
}

#[tokio::test]
async fn expired_credentials_are_rejected() {
    let env = env().await;
    let request = SignedRequest::new(&env, &env.session(-1), SystemTime::now(), "us-east-1");
    request
        .send(&env)
        .await
        .rejected(403, "ExpiredToken", "expired");
}

#[tokio::test]
async fn presigned_requests_are_checked_like_signed_ones() {
    let env = env().await;
    let alice = env.session(600);
    let time = SystemTime::now();
    let signed = || SignedRequest::presigned(&env, &alice, time, Duration::from_secs(60));
    let good = signed().send(&env).await;
    assert_eq!(
        (good.status, good.element("Account")),
        (200, "000000000000"),
        "{good:?}"
    );
    let old = SignedRequest::presigned(
        &env,
        &alice,
        time - Duration::from_secs(61),
        Duration::from_secs(60),
    );
    old.send(&env)
        .await
        .rejected(403, "SignatureDoesNotMatch", "Signature expired");
    let longer = signed().replacing("X-Amz-Expires=60", "X-Amz-Expires=61");
    longer
        .send(&env)
        .await
        .rejected(403, "SignatureDoesNotMatch", "does not match");
    let forever = signed().replacing("X-Amz-Expires=60", "X-Amz-Expires=604801");
    forever
        .send(&env)
        .await
        .rejected(400, "IncompleteSignature", "604800");
    let more = signed().replacing("Version=", "Extra=1&Version=");
    more.send(&env)
        .await
        .rejected(403, "SignatureDoesNotMatch", "does not match");
}
