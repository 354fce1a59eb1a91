//! What was tried against the daemon, carried out with real processes. The table of attacks and of the checks that stop each
//! is in attacks/README.md.

use serde_json::Value;

use crate::harness::actor::{self, play};
use crate::harness::cgroup::Cgroup;
use crate::harness::counterparts::{folder, root};
use crate::harness::daemon::Daemon;
use crate::harness::upstream::Upstream;

const ALICE: &str = "spiffe://example.org/user/alice";
const BOB: &str = "spiffe://example.org/user/bob";

/// What the daemon may have made of a scene.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Made {
    /// Credentials of this identity.
    Answered(String),
    /// A refusal, for this reason.
    Refused(String),
    /// Nothing that the client saw.
    Silence,
}

/// Which facts the rules need, so over TCP whether a process is searched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    User,
    UserAndGroup,
}

struct Stage {
    daemon: Daemon,
    _upstream: Upstream,
    cgroup: Cgroup,
    _folder: tempfile::TempDir,
}

impl Stage {
    fn set(rules: Rules) -> Self {
        let gid = |uid: u32| if rules == Rules::User { String::new() } else { format!("gid = {uid}") };
        Self::with(folder(), gid)
    }

    /// With a rule for each user, who has this key beside `uid`.
    fn with(folder: tempfile::TempDir, key: impl Fn(u32) -> String) -> Self {
        let upstream = Upstream::start(&[(61001, "alice"), (61002, "bob")]);
        let rule = |id, uid| format!("\n[[workload]]\nspiffe_id = \"{id}\"\nuid = {uid}\n{}\n", key(uid));
        let configuration = format!("{}\n{}{}", upstream.configuration(), rule(ALICE, 61001), rule(BOB, 61002));
        let daemon = Daemon::start(folder.path(), "", &configuration).ready();
        let cgroup = Cgroup::new(&format!("stage-{}", folder.path().file_name().unwrap().display()));
        Self { daemon, _upstream: upstream, cgroup, _folder: folder }
    }

    fn address(&self, listener: &str) -> String {
        match listener {
            "unix" => self.daemon.unix().display().to_string(),
            "tcp" => self.daemon.tcp().to_string(),
            _ => self.daemon.tcp6().to_string(),
        }
    }

    /// Plays a scene.
    fn play(&self, scene: &str, listener: &str) -> Made {
        self.made(scene, &play(scene, listener, &self.address(listener), Some(self.cgroup.path())))
    }

    /// Whose credentials are in the answer is read from the audit record with their key.
    fn made(&self, scene: &str, answer: &str) -> Made {
        let Some((_, body)) = answer.split_once("\r\n\r\n") else { return Made::Silence };
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{scene}: {answer}"));
        if let Some(code) = body["code"].as_str() {
            return Made::Refused(code.to_owned());
        }
        let key = body["AccessKeyId"].as_str().expect("credentials or an error");
        let record = self.daemon.audit().into_iter().find(|record| record["access_key_id"] == key);
        Made::Answered(record.expect("what is handed out is in the audit")["spiffe_id"].as_str().unwrap().to_owned())
    }
}

fn alice() -> Made {
    Made::Answered(ALICE.to_owned())
}

fn refused(reason: &str) -> Made {
    Made::Refused(reason.to_owned())
}

/// The scene's outcomes that are right; several where it depends on how far the daemon was when the scene went on.
type Right = Vec<Made>;

/// What is right in a scene; nothing where the scene does not apply.
struct Row {
    scene: &'static str,
    /// On the unix socket, for either kind of rules.
    unix: [Right; 2],
    /// On TCP where the socket alone decides.
    socket: Right,
    /// On TCP where the process is needed.
    process: Right,
}

const LISTENERS: [&str; 3] = ["unix", "tcp", "tcp6"];

/// Each scene with what is right.
fn expected() -> Vec<Row> {
    let all = |made: Made| (vec![made.clone()], vec![made.clone()], vec![made]);
    let row =
        |scene, (unix, socket, process): (Right, _, _)| Row { scene, unix: [unix.clone(), unix], socket, process };
    let gone = || vec![refused("caller_gone")];
    let changed = || vec![refused("identity_changed")];
    // While the heir's descriptor is on its way, nobody holds the socket.
    let heir = || vec![alice(), refused("no_holder"), refused("caller_gone")];
    vec![
        row("alice", all(alice())),
        row("bob", all(Made::Answered(BOB.to_owned()))),
        // Whoever holds the descriptor: the connector is asked about. On TCP Bob's process holds it too, once he has it.
        row("passed", (vec![alice()], vec![alice()], [heir(), vec![refused("ambiguous_caller")]].concat())),
        row("shared", (vec![alice()], vec![alice()], vec![refused("ambiguous_caller")])),
        // On TCP the heir is Alice's process, and holds the socket that she made.
        Row {
            scene: "other-group",
            unix: [vec![alice()], vec![refused("no_identity")]],
            socket: vec![alice()],
            process: vec![refused("ambiguous_caller")],
        },
        row("exited", (gone(), vec![alice()], heir())),
        row("zombie", (gone(), vec![alice()], heir())),
        row("reused", (gone(), vec![alice()], heir())),
        row("forked", all(alice())),
        row("executed", all(alice())),
        row("setuid", (changed(), vec![alice()], [heir(), changed()].concat())),
        row(
            "setuid-late",
            (
                changed(),
                vec![alice()],
                vec![alice(), refused("caller_gone"), refused("identity_changed"), refused("no_holder")],
            ),
        ),
        row("queued", (vec![alice()], vec![alice()], heir())),
        row("half-closed", (vec![alice(), Made::Silence], vec![alice(), Made::Silence], vec![alice(), Made::Silence])),
        row("closed", all(Made::Silence)),
        row("decoy", (vec![], vec![alice()], vec![alice()])),
        // Where the process is seen, it is seen to live in another user namespace.
        row("user-namespace", (vec![refused("no_identity")], vec![alice()], vec![refused("no_identity")])),
        row(
            "dropped",
            (
                vec![refused("identity_changed"), refused("no_identity")],
                vec![refused("no_identity")],
                vec![refused("no_identity")],
            ),
        ),
        // On TCP what counts is the cgroup in which the socket was made. On the unix socket it is that of the connector.
        row("moved", (vec![alice()], vec![alice()], vec![refused("no_holder")])),
        row("removed-cgroup", (vec![alice()], vec![refused("unreadable_cgroup")], vec![refused("unreadable_cgroup")])),
        row("threaded", (vec![alice()], vec![alice()], vec![refused("unreadable_cgroup")])),
        // The socket's owner is Alice, the process that made it is Bob's.
        row("personality", (vec![Made::Answered(BOB.to_owned())], vec![alice()], vec![refused("ambiguous_caller")])),
        // Before or after the file became Alice's; never as her, since no process of hers made the socket.
        row(
            "chowned",
            (vec![], vec![], vec![refused("ambiguous_caller"), refused("no_identity"), refused("identity_changed")]),
        ),
    ]
}

/// The outcomes that are right over this listener; none where the scene does not apply to it.
fn right<'a>(row: &'a Row, listener: &str, rules: Rules) -> &'a [Made] {
    match (listener, rules) {
        // Its addresses are of IPv4.
        ("tcp6", _) if row.scene == "decoy" => &[],
        ("unix", Rules::User) => &row.unix[0],
        ("unix", Rules::UserAndGroup) => &row.unix[1],
        (_, Rules::User) => &row.socket,
        (_, Rules::UserAndGroup) => &row.process,
    }
}

fn check(rules: Rules) {
    if !root() {
        return;
    }
    let stage = Stage::set(rules);
    let mut wrong = Vec::new();
    for row in expected() {
        for listener in LISTENERS {
            let right = right(&row, listener, rules);
            if right.is_empty() {
                continue;
            }
            let made = stage.play(row.scene, listener);
            if !right.contains(&made) {
                wrong.push(format!("{} over {listener}, {rules:?}: {made:?} is none of {right:?}", row.scene));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn scenes_where_the_user_decides() {
    check(Rules::User);
}

#[test]
fn scenes_where_the_process_is_needed() {
    check(Rules::UserAndGroup);
}

/// Attack 11: in a mount namespace of his own anybody can show any path.
#[test]
fn an_executable_is_its_file_and_not_its_path() {
    if !root() {
        return;
    }
    let folder = folder();
    let program = folder.path().join("program");
    for name in ["program", "forged"] {
        std::fs::copy(actor::program(), folder.path().join(name)).unwrap();
    }
    let stage = Stage::with(folder, |_| format!("exe = {program:?}"));
    for listener in LISTENERS {
        for (scene, right) in [
            ("program", alice()),
            ("other-program", refused("no_identity")),
            ("forged-path", refused("no_identity")),
            ("forged-path-in-user-namespace", refused("no_identity")),
        ] {
            let address = stage.address(listener);
            let answer = actor::play_program(scene, listener, &address, &program, stage.cgroup.path());
            assert_eq!(stage.made(scene, &answer), right, "{scene} over {listener}");
        }
    }
}

/// Scenes in random order, with honest callers of the same users in between. Nobody may ever be answered as somebody else,
/// and of the honest at least 99.9 % have to be answered.
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
    let stages = [(Rules::User, Stage::set(Rules::User)), (Rules::UserAndGroup, Stage::set(Rules::UserAndGroup))];
    let rows = expected();
    let (mut wrong, mut played, mut honest, mut unanswered) = (Vec::new(), 0, 0, 0);
    while played < tries {
        let (row, listener) = (&rows[random.usize(..rows.len())], LISTENERS[random.usize(..LISTENERS.len())]);
        let (rules, stage) = &stages[random.usize(..stages.len())];
        let right = right(row, listener, *rules);
        if right.is_empty() {
            continue;
        }
        played += 1;
        let made = stage.play(row.scene, listener);
        let is_right = right.contains(&made);
        if matches!(row.scene, "alice" | "bob") {
            honest += 1;
            // Not answered is a failure of another kind than answered as somebody else.
            if !is_right && !matches!(made, Made::Answered(_)) {
                unanswered += 1;
                continue;
            }
        }
        if !is_right {
            wrong.push(format!("{} over {listener}, {rules:?}: {made:?} is none of {right:?}", row.scene));
        }
        let (scene, id) = if random.bool() { ("alice", ALICE) } else { ("bob", BOB) };
        honest += 1;
        match stage.play(scene, listener) {
            Made::Answered(answered) if answered == id => {}
            Made::Answered(other) => wrong.push(format!("{scene} over {listener}, {rules:?}: answered as {other}")),
            Made::Refused(_) | Made::Silence => unanswered += 1,
        }
        if played % 1000 == 0 {
            eprintln!("{played} scenes: {} wrong, {unanswered} of {honest} honest callers not answered", wrong.len());
        }
    }
    eprintln!("{played} scenes: {} wrong, {unanswered} of {honest} honest callers not answered", wrong.len());
    assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
    assert!(unanswered * 1000 <= honest, "{unanswered} of {honest} honest callers were not answered (seed {seed})");
}
