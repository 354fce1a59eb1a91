use super::*;

use std::collections::HashSet;

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use tonic::Code;
use tonic::metadata::MetadataMap;
use tonic::transport::Endpoint;

use crate::svid::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;

const ALICE: &str = "spiffe://dev.local/user/alice";
const BOB: &str = "spiffe://dev.local/user/bob";
const ISSUER: &str = "http://127.0.0.1:1";

struct DevApiEnv {
    directory: tempfile::TempDir,
    api: DevWorkloadApi,
}

fn env(owner: Uid) -> DevApiEnv {
    let directory = tempfile::tempdir().unwrap();
    let registrations = Registrations {
        trust_domain: "dev.local".to_owned(),
        spiffe_ids: [ALICE, BOB].map(|id| SpiffeId::parse(id).unwrap()).into(),
        issuer: ISSUER.to_owned(),
        key: Arc::new(SigningKey::generate().unwrap()),
        authority: Arc::new(DevAuthority::generate("dev.local", Clock::system().now()).unwrap()),
        clock: Clock::system(),
    };
    let api =
        DevWorkloadApi::start_for(owner, &directory.path().join("api"), registrations).unwrap();
    DevApiEnv { directory, api }
}

impl DevApiEnv {
    async fn client(&self) -> SpiffeWorkloadApiClient<tonic::transport::Channel> {
        let endpoint = Endpoint::from_shared(self.api.address()).unwrap();
        SpiffeWorkloadApiClient::new(endpoint.connect().await.unwrap())
    }

    async fn fetch(&self, audience: &[&str], spiffe_id: &str) -> Result<Vec<Jwtsvid>, Status> {
        let audience = audience.iter().map(|&name| name.to_owned()).collect();
        let request = with_header(
            JwtsvidRequest {
                audience,
                spiffe_id: spiffe_id.to_owned(),
            },
            &["true"],
        );
        self.client()
            .await
            .fetch_jwtsvid(request)
            .await
            .map(|response| response.into_inner().svids)
    }
}

fn with_header<T>(message: T, values: &[&'static str]) -> Request<T> {
    let mut request = Request::new(message);
    let metadata: &mut MetadataMap = request.metadata_mut();
    for value in values {
        metadata.append(SECURITY_HEADER, value.parse().unwrap());
    }
    request
}

#[tokio::test]
async fn bundle_verifies_the_tokens() {
    let env = env(geteuid());
    let request = with_header(JwtBundlesRequest {}, &["true"]);
    let mut bundles = env
        .client()
        .await
        .fetch_jwt_bundles(request)
        .await
        .unwrap()
        .into_inner();
    let bundles = bundles.message().await.unwrap().unwrap().bundles;
    let keys: JwkSet = serde_json::from_slice(&bundles["spiffe://dev.local"]).unwrap();

    let svids = env.fetch(&["dev-sts"], ALICE).await.unwrap();
    let [
        Jwtsvid {
            spiffe_id, svid, ..
        },
    ] = &svids[..]
    else {
        panic!("{svids:?}")
    };
    assert_eq!(spiffe_id, ALICE);
    let header = jsonwebtoken::decode_header(svid).unwrap();
    assert_eq!(
        (header.typ.as_deref(), header.alg),
        (Some("JWT"), Algorithm::ES256)
    );
    let key = DecodingKey::from_jwk(keys.find(header.kid.as_deref().unwrap()).unwrap()).unwrap();
    let mut validation = Validation::new(Algorithm::ES256);
    validation.set_audience(&["dev-sts"]);
    validation.set_issuer(&[ISSUER]);
    let claims = jsonwebtoken::decode::<serde_json::Value>(svid, &key, &validation)
        .unwrap()
        .claims;
    assert_eq!(claims["sub"], ALICE);
    assert_eq!(claims["aud"], serde_json::json!(["dev-sts"]));
    assert_eq!(
        claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(),
        300
    );
}

#[tokio::test]
async fn fetch_without_an_id_returns_all_registered_ids() {
    let svids = env(geteuid()).fetch(&["dev-sts"], "").await.unwrap();
    let ids: HashSet<&str> = svids.iter().map(|svid| svid.spiffe_id.as_str()).collect();
    assert_eq!(ids, HashSet::from([ALICE, BOB]));
}

#[tokio::test]
async fn requests_are_rejected_as_the_standard_requires() {
    let env = env(geteuid());
    let table: [(&[&str], &str, Code); 6] = [
        (&[], ALICE, Code::InvalidArgument),
        (&["a", ""], ALICE, Code::InvalidArgument),
        (&["a"], "alice", Code::InvalidArgument),
        (
            &["a"],
            "spiffe://dev.local/user/carol",
            Code::PermissionDenied,
        ),
        (
            &["a"],
            "spiffe://other.local/user/alice",
            Code::PermissionDenied,
        ),
        (
            &["a"],
            "spiffe://dev.local/host/alice",
            Code::PermissionDenied,
        ),
    ];
    for (audience, spiffe_id, code) in table {
        assert_eq!(
            env.fetch(audience, spiffe_id).await.unwrap_err().code(),
            code,
            "{audience:?} {spiffe_id}"
        );
    }
    for values in [&[][..], &["True"], &["true", "true"]] {
        let message = JwtsvidRequest {
            audience: vec!["a".to_owned()],
            spiffe_id: ALICE.to_owned(),
        };
        let rejected = env
            .client()
            .await
            .fetch_jwtsvid(with_header(message, values))
            .await
            .unwrap_err();
        assert_eq!(rejected.code(), Code::InvalidArgument, "{values:?}");
    }
}

#[tokio::test]
async fn another_user_is_rejected() {
    let rejected = env(Uid::from_raw(geteuid().as_raw() + 1))
        .fetch(&["a"], ALICE)
        .await
        .unwrap_err();
    assert_eq!(rejected.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn other_users_cannot_reach_the_socket() {
    let env = env(geteuid());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let directory = env.directory.path().join("api");
    assert_eq!(
        (mode(&directory), mode(&directory.join("agent.sock"))),
        (0o700, 0o600)
    );
}
