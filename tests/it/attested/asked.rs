//! What becomes of a caller while the agent is being asked about its process. The agent is the test's own: it attests as
//! SPIRE does, and is held before it looks at the process or after that. The table of attacks is in ../attacks/README.md.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::time::Duration;

use crate::harness::actor::{self, Steps};
use crate::harness::agent::{Entry, FakeAgent};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::process::await_some;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::made::{Made, answered, refused};
use crate::harness::world::id;

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];
const BOB: u32 = 61002;

struct Stage {
    daemon: Daemon,
    agent: FakeAgent,
    cgroup: Cgroup,
    folder: tempfile::TempDir,
}

/// When something becomes of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The agent is asked, and sees what has become of it.
    Before,
    /// The agent has seen the caller itself, and is about to answer.
    After,
}

/// What came of a scene.
#[derive(Debug, PartialEq, Eq)]
struct Played {
    /// Of the request about which the agent was asked.
    made: Made,
    /// Of a request of whoever is there then, and how many questions to the agent that took.
    again: (Made, usize),
}

impl Stage {
    fn set() -> Self {
        let folder = folder();
        let program = |name: &str| folder.path().join(name);
        for (name, mode) in [("first", 0o755), ("second", 0o755), ("root", 0o4755), ("group", 0o2755)] {
            fs::copy(actor::program(), program(name)).unwrap();
            // A change of owner takes these bits away.
            chown(program(name), Some(0), Some(if name == "group" { BOB } else { 0 })).unwrap();
            fs::set_permissions(program(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = |name: &str| format!("unix:path:{}", program(name).display());
        let agent = FakeAgent::start(
            folder.path(),
            vec![
                Entry::new(&id("first"), &["unix:uid:61001", "unix:gid:61001", &path("first")]),
                Entry::new(&id("second"), &["unix:uid:61001", &path("second")]),
                Entry::new(&id("bob"), &["unix:uid:61002"]),
                Entry::new(&id("root"), &["unix:uid:0", &path("root")]),
                Entry::new(&id("group"), &["unix:gid:61002", &path("group")]),
            ],
        );
        let daemon = Daemon::start(folder.path(), "", &agent.configuration()).ready();
        let cgroup = Cgroup::new(&format!("asked-{}", folder.path().file_name().unwrap().display()));
        Self { daemon, agent, cgroup, folder }
    }

    fn first(&self) -> PathBuf {
        self.folder.path().join("first")
    }

    fn address(&self, listener: &str) -> String {
        match listener {
            "unix" => self.daemon.unix().display().to_string(),
            "tcp" => self.daemon.tcp().to_string(),
            _ => self.daemon.tcp6().to_string(),
        }
    }

    /// An honest caller that nobody holds up.
    fn honest(&self, name: &str, listener: &str) -> Made {
        let address = self.address(listener);
        let answer = actor::play_by(&self.first(), name, listener, &address, self.daemon.pid(), self.cgroup.path());
        Made::of(&answer, name, &self.daemon)
    }

    /// Plays a scene; `meanwhile` goes on while the agent is about to answer. With `early`, whoever is there then asks before
    /// that. `None` if it could not be played: somebody has taken the number that was to be used again.
    fn play(
        &self,
        row: &Row,
        (listener, moment): (&str, Moment),
        early: bool,
        meanwhile: impl FnOnce(),
    ) -> Option<Played> {
        let Row { scene, .. } = row;
        let mut steps = Steps::start(&self.first(), scene, listener, &self.address(listener), self.cgroup.path());
        let held = self.agent.hold(steps.caller());
        steps.step("ask");
        if !held.await_asked() {
            // Whatever came of it; nothing has become of the caller.
            let made = Made::of(&steps.step("alice answer"), scene, &self.daemon);
            return Some(Played { made, again: (Made::Silence, 0) });
        }
        if moment == Moment::Before && steps.step("change") != "changed" {
            return None;
        }
        held.look();
        if moment == Moment::After && steps.step("change") != "changed" {
            return None;
        }
        if scene.ends_with("-and-back") {
            steps.step("back");
        }
        meanwhile();
        let again = |steps: &mut Steps| {
            let before = self.agent.questions(self.daemon.pid());
            let made = Made::of(&steps.step("again"), scene, &self.daemon);
            (made, self.agent.questions(self.daemon.pid()) - before)
        };
        let before = early.then(|| again(&mut steps));
        let exchanged = self.agent.exchanged();
        held.answer();
        let made = Made::of(&steps.step("answer"), scene, &self.daemon);
        if matches!(made, Made::Refused(_)) {
            assert_eq!(self.agent.exchanged(), exchanged, "{scene}: a token of the wrong process was exchanged");
        }
        let again = before.unwrap_or_else(|| again(&mut steps));
        Some(Played { made, again })
    }
}

impl Played {
    /// Whether somebody was answered as another, or where it is right to refuse, or by what was said of another.
    fn is_wrong(&self, right: &Self) -> bool {
        let is_other = |made: &Made, right: &Made| matches!(made, Made::Answered(_)) && made != right;
        let (again, questions) = &self.again;
        is_other(&self.made, &right.made)
            || is_other(again, &right.again.0)
            || (matches!(again, Made::Answered(_)) && *questions < right.again.1)
    }
}

/// What is right in a scene, over every listener and at each moment.
struct Row {
    scene: &'static str,
    moments: &'static [Moment],
    right: Played,
}

impl Row {
    /// Whether another than the one who was asked about can ask while the answer is held.
    fn is_another(&self) -> bool {
        self.right.again.1 == 1 && !self.scene.ends_with("-and-back")
    }
}

fn expected() -> Vec<Row> {
    const BOTH: &[Moment] = &[Moment::Before, Moment::After];
    let row = |scene, made: &Made, again: (&str, usize)| {
        let moments = if scene == "setuid-and-back" || scene == "setgid-and-back" { &BOTH[..1] } else { BOTH };
        let again = (answered(&id(again.0)), again.1);
        Row { scene, moments, right: Played { made: made.clone(), again } }
    };
    let first = &answered(&id("first"));
    let (gone, changed) = (&refused("caller_gone"), &refused("identity_changed"));
    vec![
        // Known from now on, so the agent is not asked again.
        row("still", first, ("first", 0)),
        row("forked", first, ("first", 0)),
        // Nobody is there to see an answer.
        row("vanished", &Made::Silence, ("first", 1)),
        row("exited", gone, ("first", 1)),
        row("zombie", gone, ("first", 1)),
        row("reused", gone, ("bob", 1)),
        row("executed", changed, ("second", 1)),
        row("setuid", changed, ("root", 1)),
        row("setgid", changed, ("group", 1)),
        row("moved", changed, ("first", 1)),
        row("setuid-and-back", changed, ("first", 1)),
        row("setgid-and-back", changed, ("first", 1)),
    ]
}

/// What the audit has of refusals of Alice's processes, by their reasons.
fn refusals(daemon: &Daemon) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for record in daemon.audit_where(|_, line| line.contains("\"refused\"") && line.contains("61001")) {
        // Of many within a second the last record stands for several.
        let count = record["repeated"].as_u64().unwrap_or(1);
        *counts.entry(record["reason"].as_str().unwrap().to_owned()).or_default() += count;
    }
    counts
}

#[test]
fn an_answer_counts_only_for_the_process_that_asked() {
    if !root() {
        return;
    }
    let stage = Stage::set();
    let (mut wrong, mut expected_refusals) = (Vec::new(), BTreeMap::new());
    for moment in [Moment::Before, Moment::After] {
        for listener in LISTENERS {
            for row in expected().iter().filter(|row| row.moments.contains(&moment)) {
                let Some(played) = stage.play(row, (listener, moment), false, || {}) else {
                    eprintln!("{} over {listener} could not be played", row.scene);
                    continue;
                };
                if played != row.right {
                    wrong.push(format!("{} over {listener}, {moment:?}: {played:?}", row.scene));
                }
                if let Made::Refused(reason) = &row.right.made {
                    *expected_refusals.entry(reason.clone()).or_default() += 1;
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    await_some("all refusals are in the audit, with the right reasons", Duration::from_secs(30), || {
        (refusals(&stage.daemon) == expected_refusals).then_some(())
    });
}

/// Nobody's answer is another's, however often it is tried, and nobody else waits for a question that is held. As in the
/// other scenes in random order, what is refused or not answered for another reason, as on a machine that is very busy, has to
/// be rare.
#[test]
fn many_scenes_in_random_order() {
    if !root() {
        return;
    }
    let tries = if std::env::var("AWSVID_TESTS").is_ok_and(|mode| mode == "slow") { 10_000 } else { 150 };
    let seed =
        std::env::var("AWSVID_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    eprintln!("AWSVID_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (stage, rows) = (Stage::set(), expected());
    let mut count = Count::default();
    while count.played < tries {
        let row = &rows[random.usize(..rows.len())];
        let at @ (listener, moment) =
            (LISTENERS[random.usize(..LISTENERS.len())], row.moments[random.usize(..row.moments.len())]);
        let early = row.is_another() && random.bool();
        let what = format!("{} over {listener}, {moment:?}{}", row.scene, if early { ", early" } else { "" });
        let honest =
            [(); 2].map(|()| (["alice", "bob"][random.usize(..2)], LISTENERS[random.usize(..LISTENERS.len())]));
        let played = stage.play(row, at, early, || count.honest(&stage, honest[0], &what));
        count.scene(&what, played, row);
        count.honest(&stage, honest[1], &what);
        if count.played % 1000 == 0 {
            eprintln!("{count:?}");
        }
    }
    eprintln!("{count:?}");
    assert_eq!(count.wrong, 0, "seed {seed}: {count:?}");
    assert!(count.otherwise * 1000 <= count.played, "seed {seed}: {count:?}");
    assert!(count.unanswered * 1000 <= count.honest, "seed {seed}: {count:?}");
}

#[derive(Debug, Default)]
struct Count {
    /// Scenes, of which
    played: usize,
    /// so many had another outcome than the right one, that hurts nobody.
    otherwise: usize,
    /// Callers that nothing becomes of, of whom
    honest: usize,
    /// so many were not answered.
    unanswered: usize,
    /// Answers that nobody should have been given.
    wrong: usize,
}

impl Count {
    fn scene(&mut self, what: &str, played: Option<Played>, row: &Row) {
        self.played += 1;
        match &played {
            Some(played) if *played == row.right => return,
            Some(played) if played.is_wrong(&row.right) => self.wrong += 1,
            _ => self.otherwise += 1,
        }
        eprintln!("{what}: {played:?}");
    }

    fn honest(&mut self, stage: &Stage, (name, listener): (&str, &str), when: &str) {
        self.honest += 1;
        let made = stage.honest(name, listener);
        match &made {
            Made::Answered(id) if *id == self::id(if name == "alice" { "first" } else { name }) => return,
            Made::Answered(_) => self.wrong += 1,
            _ => self.unanswered += 1,
        }
        eprintln!("{name} over {listener}, at {when}: {made:?}");
    }
}
