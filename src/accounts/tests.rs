use std::collections::BTreeSet;
use std::sync::Condvar;

use nix::errno::Errno;

use super::entry::{ABSENT_GRACE, RECHECK_INTERVAL};
use super::lookup::MAX_LOOKUPS;
use super::*;
use crate::caller::unchanged::unchanged;
use crate::caller::{Caller, ListenerKind};
use crate::identity::SpiffeId;
use crate::workload_rule::{NamedRule, WorkloadRule};

/// A name service with answers that a test changes.
#[derive(Default)]
struct FakeNameService {
    answers: Mutex<BTreeMap<String, nix::Result<Option<u32>>>>,
    /// Lookups of these names do not end.
    hanging: Mutex<BTreeSet<String>>,
    ended: Condvar,
    local: Mutex<Arc<LocalAccounts>>,
    lookups: Mutex<Vec<String>>,
}

impl FakeNameService {
    fn with(answers: &[(&str, nix::Result<Option<u32>>)]) -> Arc<Self> {
        let service = Arc::new(Self::default());
        answers
            .iter()
            .for_each(|(name, answer)| service.set(name, *answer));
        service
    }

    fn set(&self, name: &str, answer: nix::Result<Option<u32>>) {
        self.answers.lock().unwrap().insert(name.to_owned(), answer);
    }

    fn hang(&self, names: &[&str]) {
        *self.hanging.lock().unwrap() = names.iter().map(|name| (*name).to_owned()).collect();
        self.ended.notify_all();
    }

    fn count(&self, name: &str) -> usize {
        self.lookups
            .lock()
            .unwrap()
            .iter()
            .filter(|one| *one == name)
            .count()
    }
}

impl NameService for Arc<FakeNameService> {
    fn id(&self, name: &AccountName) -> nix::Result<Option<u32>> {
        self.lookups.lock().unwrap().push(name.as_str().to_owned());
        let hanging = self.hanging.lock().unwrap();
        drop(
            self.ended
                .wait_while(hanging, |names| names.contains(name.as_str()))
                .unwrap(),
        );
        self.answers
            .lock()
            .unwrap()
            .get(name.as_str())
            .copied()
            .unwrap_or(Ok(None))
    }

    fn name(&self, _: &AccountName, id: u32) -> nix::Result<Option<String>> {
        let answers = self.answers.lock().unwrap();
        Ok(answers
            .iter()
            .find(|(_, answer)| **answer == Ok(Some(id)))
            .map(|(name, _)| name.clone()))
    }

    fn local(&self, _: &Arc<LocalAccounts>) -> Arc<LocalAccounts> {
        self.local.lock().unwrap().clone()
    }
}

fn user(name: &str) -> AccountName {
    AccountName::User(name.to_owned())
}

fn names(names: &[&str]) -> BTreeMap<AccountName, Vec<ConfigLine>> {
    names
        .iter()
        .map(|name| (user(name), vec![1.into()]))
        .collect()
}

const WAIT: Duration = Duration::from_secs(3);

async fn accounts_of(service: &Arc<FakeNameService>, added: &[&str]) -> Accounts {
    let accounts = Accounts::new(service.clone(), Metrics::default());
    accounts.add(names(added), WAIT).await;
    accounts
}

fn state_of(accounts: &Accounts, name: &str) -> AccountState {
    accounts.ids().get(&user(name))
}

/// Waits until `name` has this state. The test's clock advances while nothing else happens.
async fn await_state(accounts: &Accounts, name: &str, expected: AccountState) {
    let mut ids = accounts.0.ids.subscribe();
    ids.wait_for(|ids| ids.get(&user(name)) == expected)
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn lookup_finds_a_user_created_later() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001))), ("away", Err(Errno::EIO))]);
    let accounts = accounts_of(&service, &["alice", "away", "late"]).await;
    assert_eq!(state_of(&accounts, "alice"), AccountState::Id(1001));
    assert_eq!(
        (state_of(&accounts, "away"), state_of(&accounts, "late")),
        (AccountState::Unanswered, AccountState::Absent)
    );
    assert_eq!(accounts.0.metrics.unknown_accounts.get(), 2);
    service.set("late", Ok(Some(1002)));
    service.set("away", Ok(Some(1003)));
    await_state(&accounts, "late", AccountState::Id(1002)).await;
    await_state(&accounts, "away", AccountState::Id(1003)).await;
    assert_eq!(accounts.0.metrics.unknown_accounts.get(), 0);
    // A stable number is resolved about once a minute.
    let before = service.count("alice");
    tokio::time::sleep(10 * RECHECK_INTERVAL).await;
    assert!(
        (8..=12).contains(&(service.count("alice") - before)),
        "{}",
        service.count("alice") - before
    );
}

#[tokio::test(start_paused = true)]
async fn lookup_backs_off_for_a_missing_user() {
    let service = FakeNameService::with(&[]);
    let start = Instant::now();
    let accounts = accounts_of(&service, &["late"]).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let hour = service.count("late");
    assert!((55..=75).contains(&hour), "{hour} lookups in an hour");
    assert!(start.elapsed() >= Duration::from_secs(3600));
    // Requests cause further lookups, at most one a second.
    for _ in 0..100 {
        accounts.await_lookup(&[user("late")], LOOKUP_WAIT).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let more = service.count("late") - hour;
    assert!((9..=12).contains(&more), "{more} lookups in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn lookup_follows_a_changed_number_and_a_successor() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let accounts = accounts_of(&service, &["alice"]).await;
    service.set("alice", Ok(Some(2001)));
    await_state(&accounts, "alice", AccountState::Id(2001)).await;
    // The user is deleted, and another one gets its number.
    service.set("alice", Ok(None));
    service.set("bob", Ok(Some(2001)));
    let start = Instant::now();
    await_state(&accounts, "alice", AccountState::Absent).await;
    assert!(
        start.elapsed() <= RECHECK_INTERVAL + MIN_LOOKUP_INTERVAL,
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn number_survives_failures_and_restarts_of_the_name_service() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let accounts = accounts_of(&service, &["alice"]).await;
    service.set("alice", Err(Errno::ECONNREFUSED));
    tokio::time::sleep(Duration::from_secs(7200)).await;
    assert_eq!(state_of(&accounts, "alice"), AccountState::Id(1001));
    // Some name services report that a name does not exist while they restart.
    service.set("alice", Ok(None));
    tokio::time::sleep(ABSENT_GRACE).await;
    assert_eq!(state_of(&accounts, "alice"), AccountState::Id(1001));
    service.set("alice", Ok(Some(1001)));
    tokio::time::sleep(2 * RECHECK_INTERVAL).await;
    service.set("alice", Ok(None));
    let start = Instant::now();
    await_state(&accounts, "alice", AccountState::Absent).await;
    assert!(start.elapsed() >= ABSENT_GRACE, "{:?}", start.elapsed());
}

#[tokio::test]
async fn hanging_lookup_does_not_delay_others() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let many: Vec<String> = (0..2 * MAX_LOOKUPS)
        .map(|number| format!("remote{number}"))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    service.hang(&many);
    *service.local.lock().unwrap() = LocalAccounts::of("alice:x:1001:1001::/:/bin/sh\n", "");
    let accounts = Accounts::new(service.clone(), Metrics::default());
    let all = [&many[..], &["alice"]].concat();
    // More names hang than may be resolved at one time. A local name is resolved all the same.
    accounts.add(names(&all), Duration::from_millis(100)).await;
    await_state(&accounts, "alice", AccountState::Id(1001)).await;
    assert_eq!(state_of(&accounts, "remote0"), AccountState::Unanswered);
    assert_eq!(service.lookups.lock().unwrap().len(), MAX_LOOKUPS + 1);
    service.set("remote0", Ok(Some(5)));
    service.hang(&[]);
    await_state(&accounts, "remote0", AccountState::Id(5)).await;
}

#[tokio::test(start_paused = true)]
async fn numbers_survive_another_configuration() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001))), ("bob", Ok(Some(1002)))]);
    let accounts = accounts_of(&service, &["alice"]).await;
    service.set("alice", Err(Errno::EIO));
    accounts.add(names(&["bob"]), WAIT).await;
    assert_eq!(
        [state_of(&accounts, "alice"), state_of(&accounts, "bob")],
        [AccountState::Id(1001), AccountState::Id(1002)]
    );
    accounts.keep(&names(&["bob"]));
    assert_eq!(accounts.names(), names(&["bob"]));
    assert_eq!(state_of(&accounts, "alice"), AccountState::Unanswered);
}

fn caller(uid: u32) -> Caller {
    unchanged(
        ListenerKind::Unix,
        uid,
        Some("/system.slice/app.service"),
        None,
    )
}

fn rule(path: &str, name: Option<&str>) -> NamedRule {
    let rule = WorkloadRule {
        spiffe_id: SpiffeId::parse(&format!("spiffe://example.org/{path}")).unwrap(),
        uid: None,
        gid: None,
        supplementary_group: None,
        exe: None,
        systemd_unit: Some("app.service".to_owned()),
        cgroup: None,
    };
    NamedRule {
        user: name.map(user),
        ..rule.into()
    }
}

/// Returns rules for two users, and for all others in the unit.
async fn rules(service: &Arc<FakeNameService>) -> LiveRules {
    let accounts = accounts_of(service, &["alice", "away"]).await;
    LiveRules::new(
        vec![
            rule("alice", Some("alice")),
            rule("away", Some("away")),
            rule("app", None),
        ],
        &accounts,
    )
}

async fn identity(rules: &LiveRules, uid: u32) -> Result<String, IdentifyError> {
    let id = rules.identify(&caller(uid)).await?;
    Ok(id.map_or_else(String::new, |id| {
        id.segments().collect::<Vec<_>>().join("/")
    }))
}

#[tokio::test(start_paused = true)]
async fn caller_is_undecided_while_an_earlier_rule_may_match() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001))), ("away", Err(Errno::EIO))]);
    *service.local.lock().unwrap() = LocalAccounts::of("root:x:0:0::/:/bin/sh\n", "");
    let rules = rules(&service).await;
    // Other callers are served: alice, root, which the local files name, and a unit with
    // DynamicUser=.
    assert_eq!(identity(&rules, 1001).await, Ok("alice".to_owned()));
    assert_eq!(identity(&rules, 0).await, Ok("app".to_owned()));
    assert_eq!(identity(&rules, 61_200).await, Ok("app".to_owned()));
    assert_eq!(
        identity(&rules, 1002).await,
        Err(IdentifyError::UnknownAccount(user("away")))
    );
    // The dependent request causes the lookup. Without it the lookup would run once a minute.
    tokio::time::sleep(Duration::from_secs(3610)).await;
    service.set("away", Ok(Some(1002)));
    assert_eq!(identity(&rules, 1002).await, Ok("away".to_owned()));
    assert_eq!(identity(&rules, 1003).await, Ok("app".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn missing_user_does_not_block_a_later_rule() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let rules = rules(&service).await;
    assert_eq!(identity(&rules, 1002).await, Ok("app".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn new_user_is_found_by_its_first_request() {
    let service = FakeNameService::with(&[]);
    let accounts = accounts_of(&service, &["new"]).await;
    let rules = LiveRules::new(vec![rule("new", Some("new"))], &accounts);
    // Without requests it is resolved only every minute by then.
    tokio::time::sleep(Duration::from_secs(3600)).await;
    service.set("new", Ok(Some(1001)));
    let start = Instant::now();
    assert_eq!(identity(&rules, 1001).await, Ok("new".to_owned()));
    assert!(start.elapsed() < LOOKUP_WAIT);
}

#[test]
fn local_files_are_parsed_as_passwd_5_defines() {
    let local = LocalAccounts::of(
        "root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\n+ldap::::::\n+:x:7:7\n#old:x:8:8\nbad\n:x:9:9\n",
        "adm:x:4:root\n",
    );
    let group = |name: &str| AccountName::Group(name.to_owned());
    assert!(local.has(&user("root")) && local.has(&user("toor")) && local.has(&group("adm")));
    assert!(!local.has(&user("adm")) && !local.has(&user("+")) && !local.has(&user("#old")));
    assert!(local.is_other(&user("alice"), 0) && !local.is_other(&user("toor"), 0));
    for id in [4, 7, 8, 9, 1001] {
        assert!(!local.is_other(&user("alice"), id), "{id}");
    }
    assert!(local.is_other(&group("ops"), 4) && !local.is_other(&group("ops"), 0));
    assert!(local.is_other(&user("alice"), 61_184) && !local.is_other(&group("ops"), 61_184));
}
