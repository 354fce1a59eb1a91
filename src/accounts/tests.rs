use std::collections::BTreeSet;
use std::sync::Condvar;

use super::*;
use crate::caller::unchanged::unchanged;
use crate::caller::{Caller, ListenerKind};
use crate::identity::SpiffeId;
use crate::workload_rule::{NamedRule, WorkloadRule};

/// A name service whose answers a test changes.
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
    fn number(&self, name: &AccountName) -> nix::Result<Option<u32>> {
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

    fn name(&self, _: &AccountName, number: u32) -> nix::Result<Option<String>> {
        let answers = self.answers.lock().unwrap();
        Ok(answers
            .iter()
            .find(|(_, answer)| **answer == Ok(Some(number)))
            .map(|(name, _)| name.clone()))
    }

    fn local(&self, _: &Arc<LocalAccounts>) -> Arc<LocalAccounts> {
        self.local.lock().unwrap().clone()
    }
}

fn user(name: &str) -> AccountName {
    AccountName::User(name.to_owned())
}

fn names(names: &[&str]) -> BTreeMap<AccountName, Vec<usize>> {
    names.iter().map(|name| (user(name), vec![1])).collect()
}

const PATIENCE: Duration = Duration::from_secs(3);

async fn following(service: &Arc<FakeNameService>, wanted: &[&str]) -> Accounts {
    let accounts = Accounts::new(service.clone(), Metrics::default());
    accounts.follow(names(wanted), PATIENCE).await;
    accounts
}

fn known(accounts: &Accounts, name: &str) -> Known {
    accounts.numbers().get(&user(name))
}

/// Waits until this is known of a name. Time passes by itself while nothing else happens.
async fn await_known(accounts: &Accounts, name: &str, expected: Known) {
    let mut numbers = accounts.0.numbers.subscribe();
    numbers
        .wait_for(|numbers| numbers.get(&user(name)) == expected)
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_user_that_comes_later_is_found_in_the_background() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001))), ("away", Err(Errno::EIO))]);
    let accounts = following(&service, &["alice", "away", "late"]).await;
    assert_eq!(known(&accounts, "alice"), Known::Number(1001));
    assert_eq!(
        (known(&accounts, "away"), known(&accounts, "late")),
        (Known::Unanswered, Known::Absent)
    );
    assert_eq!(accounts.0.metrics.unknown_accounts.get(), 2);
    service.set("late", Ok(Some(1002)));
    service.set("away", Ok(Some(1003)));
    await_known(&accounts, "late", Known::Number(1002)).await;
    await_known(&accounts, "away", Known::Number(1003)).await;
    assert_eq!(accounts.0.metrics.unknown_accounts.get(), 0);
    // A number that stays is looked up about once in a minute.
    let before = service.count("alice");
    tokio::time::sleep(10 * RECHECK).await;
    assert!(
        (8..=12).contains(&(service.count("alice") - before)),
        "{}",
        service.count("alice") - before
    );
}

#[tokio::test(start_paused = true)]
async fn one_that_stays_away_is_looked_up_less_and_less() {
    let service = FakeNameService::with(&[]);
    let begun = Instant::now();
    let accounts = following(&service, &["late"]).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let hour = service.count("late");
    assert!((55..=75).contains(&hour), "{hour} lookups in an hour");
    assert!(begun.elapsed() >= Duration::from_secs(3600));
    // Requests cause further ones, at most one a second.
    for _ in 0..100 {
        accounts.await_lookup(&[user("late")], LOOKUP_WAIT).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let more = service.count("late") - hour;
    assert!((9..=12).contains(&more), "{more} lookups in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn another_number_takes_effect_and_so_does_a_successor() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let accounts = following(&service, &["alice"]).await;
    service.set("alice", Ok(Some(2001)));
    await_known(&accounts, "alice", Known::Number(2001)).await;
    // The user is deleted, and another one gets its number.
    service.set("alice", Ok(None));
    service.set("bob", Ok(Some(2001)));
    let begun = Instant::now();
    await_known(&accounts, "alice", Known::Absent).await;
    assert!(begun.elapsed() <= RECHECK + PAUSE, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_known_number_survives_failures_and_a_restart_of_the_name_service() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let accounts = following(&service, &["alice"]).await;
    service.set("alice", Err(Errno::ECONNREFUSED));
    tokio::time::sleep(Duration::from_secs(7200)).await;
    assert_eq!(known(&accounts, "alice"), Known::Number(1001));
    // Some report that there is no such name while they restart.
    service.set("alice", Ok(None));
    tokio::time::sleep(ABSENT_GRACE).await;
    assert_eq!(known(&accounts, "alice"), Known::Number(1001));
    service.set("alice", Ok(Some(1001)));
    tokio::time::sleep(2 * RECHECK).await;
    service.set("alice", Ok(None));
    let begun = Instant::now();
    await_known(&accounts, "alice", Known::Absent).await;
    assert!(begun.elapsed() >= ABSENT_GRACE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_lookup_that_hangs_delays_no_other() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let many: Vec<String> = (0..2 * MAX_LOOKUPS)
        .map(|number| format!("remote{number}"))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    service.hang(&many);
    *service.local.lock().unwrap() = LocalAccounts::of("alice:x:1001:1001::/:/bin/sh\n", "");
    let accounts = Accounts::new(service.clone(), Metrics::default());
    let all = [&many[..], &["alice"]].concat();
    // More names hang than are looked up at one time; that of the local files is answered all the same.
    accounts
        .follow(names(&all), Duration::from_millis(100))
        .await;
    await_known(&accounts, "alice", Known::Number(1001)).await;
    assert_eq!(known(&accounts, "remote0"), Known::Unanswered);
    assert_eq!(service.lookups.lock().unwrap().len(), MAX_LOOKUPS + 1);
    service.set("remote0", Ok(Some(5)));
    service.hang(&[]);
    await_known(&accounts, "remote0", Known::Number(5)).await;
}

#[tokio::test(start_paused = true)]
async fn another_configuration_keeps_what_is_known() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001))), ("bob", Ok(Some(1002)))]);
    let accounts = following(&service, &["alice"]).await;
    service.set("alice", Err(Errno::EIO));
    accounts.follow(names(&["alice", "bob"]), PATIENCE).await;
    assert_eq!(
        [known(&accounts, "alice"), known(&accounts, "bob")],
        [Known::Number(1001), Known::Number(1002)]
    );
    accounts.follow(names(&["bob"]), PATIENCE).await;
    assert_eq!(known(&accounts, "alice"), Known::Unanswered);
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

/// Rules for two users and for all others in the unit.
async fn rules(service: &Arc<FakeNameService>) -> LiveRules {
    let accounts = following(service, &["alice", "away"]).await;
    LiveRules::new(
        vec![
            rule("alice", Some("alice")),
            rule("away", Some("away")),
            rule("app", None),
        ],
        &accounts,
    )
}

async fn identity(rules: &LiveRules, uid: u32) -> Result<String, Undecided> {
    let id = rules.identify(&caller(uid)).await?;
    Ok(id.map_or_else(String::new, |id| {
        id.segments().collect::<Vec<_>>().join("/")
    }))
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_could_be_an_earlier_rules_user_is_not_taken_for_another() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001))), ("away", Err(Errno::EIO))]);
    *service.local.lock().unwrap() = LocalAccounts::of("root:x:0:0::/:/bin/sh\n", "");
    let rules = rules(&service).await;
    // Others are served: alice, root, whom the local files name, and a unit with DynamicUser=.
    assert_eq!(identity(&rules, 1001).await, Ok("alice".to_owned()));
    assert_eq!(identity(&rules, 0).await, Ok("app".to_owned()));
    assert_eq!(identity(&rules, 61_200).await, Ok("app".to_owned()));
    assert_eq!(
        identity(&rules, 1002).await,
        Err(Undecided::UnknownAccount(user("away")))
    );
    // The request that depends on it causes the lookup: by then it is otherwise only every minute.
    tokio::time::sleep(Duration::from_secs(3610)).await;
    service.set("away", Ok(Some(1002)));
    assert_eq!(identity(&rules, 1002).await, Ok("away".to_owned()));
    assert_eq!(identity(&rules, 1003).await, Ok("app".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_user_who_does_not_exist_keeps_nobody_from_a_later_rule() {
    let service = FakeNameService::with(&[("alice", Ok(Some(1001)))]);
    let rules = rules(&service).await;
    assert_eq!(identity(&rules, 1002).await, Ok("app".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_new_user_is_known_to_its_first_request() {
    let service = FakeNameService::with(&[]);
    let accounts = following(&service, &["new"]).await;
    let rules = LiveRules::new(vec![rule("new", Some("new"))], &accounts);
    // By then it is looked up only every minute.
    tokio::time::sleep(Duration::from_secs(3600)).await;
    service.set("new", Ok(Some(1001)));
    let begun = Instant::now();
    assert_eq!(identity(&rules, 1001).await, Ok("new".to_owned()));
    assert!(begun.elapsed() < LOOKUP_WAIT);
}

#[test]
fn the_local_files_are_read_as_passwd_5_has_them() {
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
