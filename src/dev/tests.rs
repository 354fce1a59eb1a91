use super::*;

use aws_credential_types::Credentials as SigningCredentials;
use aws_sdk_sts::config::{BehaviorVersion, Config as SdkConfig, Region};

use crate::config::{AuditFile, Config, LoadedConfig};
use crate::identity::{AttestedFacts, SpiffeId};
use crate::role::{Identity, RequestedRole};
use crate::socket_endpoint::Endpoint;
use crate::svid::SourceError;

async fn dev(names: &[(u32, &str)]) -> Dev {
    let accounts = names.iter().map(|(uid, name)| local_users::LocalAccount {
        uid: *uid,
        name: Some((*name).to_owned()),
    });
    Dev::start_for(
        local_users::identities(accounts).unwrap(),
        DevNames::default(),
    )
    .await
    .unwrap()
}

fn parsed(dev: &Dev, quiet: bool) -> LoadedConfig {
    Config::parse_for_dev(&dev.configuration(0, quiet), &|_| None).unwrap()
}

#[tokio::test]
async fn certificate_is_exchanged_for_a_session() {
    let dev = dev(&[(1000, "alice")]).await;
    let config = parsed(&dev, false).config;
    let alice = SpiffeId::parse("spiffe://dev.local/user/alice").unwrap();
    let identities = [Identity {
        spiffe_id: alice.clone(),
        hint: None,
    }];
    let requested = RequestedRole::ByName("dev-certificate".to_owned());
    let facts = crate::identity::AttestedFacts::default();
    let grant = config
        .roles
        .select(&identities, &facts, &requested)
        .unwrap();
    let source = crate::svid::WorkloadApi::new(
        config.identity.workload_api_socket.clone(),
        [],
        Clock::system(),
        crate::metrics::Metrics::default(),
    );
    let svid = source.fetch_x509(&alice).await.unwrap();
    let settings = crate::sts::Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file: None,
        network: crate::sts::NetworkSettings::default(),
        blocking: crate::sts::BlockingCalls::default(),
    };
    let client = crate::roles_anywhere::RolesAnywhere::new(settings, Clock::system());
    let at = grant.role.exchange.roles_anywhere().unwrap();
    let session = crate::roles_anywhere::CreateSession::create_session(&client, &grant, at, &svid);
    assert!(session.await.unwrap().access_key_id.starts_with("ASIA"));
    assert_eq!(dev.sts().accepted_requests().len(), 1);
}

#[tokio::test]
async fn configuration_works_with_the_daemons_parts() {
    let dev = dev(&[(1000, "alice"), (1001, "bob")]).await;
    let config = parsed(&dev, false).config;
    let alice = SpiffeId::parse("spiffe://dev.local/user/alice").unwrap();
    assert_eq!(
        *config
            .workloads
            .iter()
            .find(|one| one.rule.rule.uid == Some(1000))
            .unwrap()
            .rule
            .spiffe_id(),
        alice
    );
    let identities = [Identity {
        spiffe_id: alice.clone(),
        hint: None,
    }];
    let grant = config
        .roles
        .select(
            &identities,
            &AttestedFacts::default(),
            &RequestedRole::ByName("dev".to_owned()),
        )
        .unwrap();

    let source = crate::svid::WorkloadApi::new(
        config.identity.workload_api_socket.clone(),
        config
            .workloads
            .iter()
            .map(|workload| workload.rule.rule.clone()),
        Clock::system(),
        crate::metrics::Metrics::default(),
    );
    let token = source.fetch(&alice, &grant.role.audience).await.unwrap();
    let settings = crate::sts::Settings {
        timeout: config.sts.timeout,
        max_concurrent: config.sts.max_concurrent,
        ca_file: None,
        network: crate::sts::NetworkSettings::default(),
        blocking: crate::sts::BlockingCalls::default(),
    };
    let sts = crate::sts::Sts::new(settings, Clock::system());
    let issued = crate::sts::AssumeRole::assume(&sts, &grant, &token)
        .await
        .unwrap();
    assert_eq!(dev.sts().issued(), 1);

    let credentials = SigningCredentials::new(
        issued.access_key_id.as_str(),
        issued.secret_access_key.as_str(),
        Some(issued.session_token.to_string()),
        None,
        "test",
    );
    let client = aws_sdk_sts::Client::from_conf(
        SdkConfig::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(REGION))
            .endpoint_url(dev.sts().url())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .credentials_provider(credentials)
            .build(),
    );
    let identity = client.get_caller_identity().send().await.unwrap();
    assert_eq!(
        identity.arn(),
        Some("arn:aws:sts::000000000000:assumed-role/dev/dev.local=user=alice")
    );

    let carol = SpiffeId::parse("spiffe://dev.local/user/carol").unwrap();
    let rejected = source.fetch(&carol, AUDIENCE).await.unwrap_err();
    assert!(matches!(rejected, SourceError::Denied(_)), "{rejected:?}");
}

#[tokio::test]
async fn sockets_are_on_loopback_or_in_a_private_directory() {
    let dev = dev(&[(1000, "alice")]).await;
    let listen = parsed(&dev, false).config.listen;
    assert!(
        listen
            .tcp
            .iter()
            .chain(&listen.admin)
            .all(|address| address.ip().is_loopback())
    );
    let directory = dev.directory.path().to_owned();
    let Endpoint::Unix(api) = Endpoint::parse(&dev.workload_api.address()).unwrap() else {
        panic!("no unix socket")
    };
    for path in [
        listen.unix.unwrap(),
        listen.status.unwrap(),
        listen.token_file,
        api,
    ] {
        assert!(path.starts_with(&directory), "{}", path.display());
    }
    let found = std::fs::metadata(&directory).unwrap();
    let expected_mode = if geteuid().is_root() { 0o755 } else { 0o700 };
    assert_eq!(found.permissions().mode() & 0o777, expected_mode);
    drop(dev);
    assert!(!directory.exists());
}

#[tokio::test]
async fn daemon_is_quiet_with_a_command() {
    let dev = dev(&[(1000, "alice")]).await;
    let loud = parsed(&dev, false).config;
    assert_eq!(
        (loud.audit.file, loud.log.level.as_str()),
        (AuditFile::Stdout, "info")
    );
    let quiet = parsed(&dev, true).config;
    assert_eq!(
        (quiet.audit.file, quiet.log.level.as_str()),
        (AuditFile::Path(dev.path("audit.log")), "error")
    );
}

#[tokio::test]
async fn user_that_runs_dev_is_served() {
    let dev = Dev::start().await.unwrap();
    assert_eq!(dev.users()[0].uid, geteuid().as_raw());
    let rules = parsed(&dev, false).config.workloads;
    assert_eq!(rules.len(), dev.users().len());
}
