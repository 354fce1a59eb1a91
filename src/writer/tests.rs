use super::*;
use std::io::{BufRead, BufReader, Read, Seek};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Counts losses, and notes in the stream how many events they were.
#[derive(Debug, Clone, Default)]
struct LossCounter(Arc<AtomicU64>);

impl LossObserver for LossCounter {
    fn lost(&self, _: &LineLoss) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn over(&self, events: u64) -> Vec<u8> {
        format!("lost {events}\n").into_bytes()
    }
}

fn writer(to: impl Into<OwnedFd>) -> (Writer, LossCounter) {
    let losses = LossCounter::default();
    let writer = Writer::new(Box::new(losses.clone()));
    writer.start("test", File::from(to.into())).unwrap();
    (writer, losses)
}

fn line(number: usize, user: u32, priority: Priority) -> Line {
    let bytes = format!("{user} {number:01000}\n").into_bytes();
    Line {
        bytes,
        stands_for: 1,
        owner: Some(WorkloadKey::user(user)),
        priority,
    }
}

/// So many lines of this user, of which as many are taken as there is room for.
fn fill(writer: &Writer, user: u32, priority: Priority) -> u64 {
    (0..)
        .map_while(|number| writer.push(line(number, user, priority)))
        .count()
        .try_into()
        .unwrap()
}

fn lines_of(user: u32, lines: &[String]) -> u64 {
    lines
        .iter()
        .filter(|line| line.starts_with(&format!("{user} ")))
        .count()
        .try_into()
        .unwrap()
}

/// T30: the destination stalls, and one workload fills the queue.
#[test]
fn stalled_destination_blocks_no_caller_and_sheds_the_flooder() {
    let (from, to) = pipe().unwrap();
    // The smallest pipe, which is one page.
    let size = fcntl(&to, FcntlArg::F_SETPIPE_SZ(1)).unwrap();
    let (writer, losses) = writer(to);
    let mut taken = [0; 20];
    // The pipe is full before a line is lost, so that the stream has one note of all losses.
    for number in 0..usize::try_from(size).unwrap() / 1003 {
        let is_written = writer.push(line(number, 1, Priority::Ordinary)).unwrap();
        assert!(is_written.blocking_recv().unwrap());
        taken[1] += 1;
    }
    taken[1] += fill(&writer, 1, Priority::Ordinary);
    // One that was rejected.
    assert_eq!(losses.0.load(Ordering::Relaxed), 1);
    let share = u64::try_from(MAX_QUEUED_BYTES / 16 / (1003 + LINE_OVERHEAD_BYTES)).unwrap();
    // A pipe takes some.
    assert!(
        (share..share + 100).contains(&taken[1]),
        "{}, not {share}",
        taken[1]
    );
    taken[2] = fill(&writer, 2, Priority::Ordinary);
    assert!(
        (share - 1..=share).contains(&taken[2]),
        "another one's share is as large: {}",
        taken[2]
    );
    // As many as fit, and then what is more important.
    for user in 3..17 {
        taken[usize::try_from(user).unwrap()] = fill(&writer, user, Priority::Ordinary);
    }
    assert_eq!(taken[14..17], [0, 0, 0]);
    assert!(!writer.is_failing());
    taken[17] = fill(&writer, 17, Priority::High);
    assert!(taken[17] > 3 * share, "{}", taken[17]);
    taken[18] = fill(&writer, 18, Priority::High);
    assert_eq!(fill(&writer, 19, Priority::High), 0, "and that is all");
    let rejected = losses.0.load(Ordering::Relaxed);
    writer.flush(Duration::from_millis(1));
    writer.fall_behind();
    assert!(writer.is_behind());

    // The reader reads.
    let reading = std::thread::spawn(move || {
        BufReader::new(File::from(from))
            .lines()
            .map(Result::unwrap)
            .collect()
    });
    writer.flush(TIMEOUT);
    assert!(!writer.is_behind());
    assert!(
        writer.push(line(0, 1, Priority::Ordinary)).is_some(),
        "there is room again"
    );
    drop(writer);
    let lines: Vec<String> = reading.join().unwrap();
    for user in 2..20 {
        assert_eq!(
            lines_of(user, &lines),
            taken[usize::try_from(user).unwrap()],
            "of {user}"
        );
    }
    assert_eq!(lines_of(1, &lines), taken[1] + 1);
    assert_eq!(
        lines
            .iter()
            .filter(|line| **line == format!("lost {rejected}"))
            .count(),
        1,
        "it is logged once"
    );
    let whole = |line: &&String| line.len() > 1000 || line.starts_with("lost ");
    assert_eq!(lines.iter().filter(whole).count(), lines.len());
}

#[test]
fn receiver_gets_whether_line_was_written() {
    let (from, to) = pipe().unwrap();
    let (writer, losses) = writer(to);
    assert!(
        writer
            .push(line(1, 1, Priority::High))
            .unwrap()
            .blocking_recv()
            .unwrap()
    );
    drop(from);
    // The reader is gone.
    assert!(
        !writer
            .push(line(2, 1, Priority::High))
            .unwrap()
            .blocking_recv()
            .unwrap()
    );
    assert!(writer.is_failing());
    writer.flush(TIMEOUT);
    assert_eq!(losses.0.load(Ordering::Relaxed), 1);
}

#[test]
fn writer_waits_for_reader_that_shares_its_file() {
    let (from, to) = pipe().unwrap();
    // As a shell's child does to what it shares with others.
    fcntl(&to, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let (writer, losses) = writer(to);
    let taken = fill(&writer, 1, Priority::High);
    let reading = std::thread::spawn(move || {
        let mut all = String::new();
        File::from(from).read_to_string(&mut all).unwrap();
        all.lines().count()
    });
    writer.flush(TIMEOUT);
    drop(writer);
    assert_eq!(
        u64::try_from(reading.join().unwrap()).unwrap(),
        taken + 1,
        "with the line about what was rejected"
    );
    assert_eq!(losses.0.load(Ordering::Relaxed), 1);
}

/// As on a disk that becomes full within a line, and has room again later.
#[test]
fn line_that_is_cut_off_breaks_no_other() {
    let mut file = File::from(memfd_create(c"full", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(4096).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
    let (writer, losses) = writer(file.try_clone().unwrap());
    let written = |number| {
        writer
            .push(line(number, 1, Priority::High))
            .unwrap()
            .blocking_recv()
            .unwrap()
    };
    assert_eq!(
        [1, 2, 3, 4, 5, 6].map(written),
        [true, true, true, true, false, false]
    );
    let end = file.stream_position().unwrap();
    assert!(end > 4 * 1003, "a part of the fifth is there");
    // Room, at the beginning.
    file.rewind().unwrap();
    assert!(written(7));
    writer.flush(TIMEOUT);
    let mut text = vec![0; usize::try_from(file.stream_position().unwrap()).unwrap()];
    file.rewind().unwrap();
    file.read_exact(&mut text).unwrap();
    assert_eq!(
        String::from_utf8(text).unwrap(),
        format!("\n1 {:01000}\nlost 2\n", 7)
    );
    assert_eq!(losses.0.load(Ordering::Relaxed), 2);
}

#[test]
fn line_before_start_is_written_after_it() {
    let (from, to) = pipe().unwrap();
    let writer = Writer::new(Box::new(LossCounter::default()));
    let written = writer.push(line(1, 1, Priority::High)).unwrap();
    writer.start("test", to.into()).unwrap();
    assert!(written.blocking_recv().unwrap());
    drop(writer);
    let mut all = String::new();
    File::from(from).read_to_string(&mut all).unwrap();
    assert_eq!(all.lines().count(), 1);
}
