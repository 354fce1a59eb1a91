//! Child processes, which never outlive the bench.
#![allow(unsafe_code, reason = "what runs between fork and exec")]

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

use crate::BenchError;

/// Starts a child that the kernel kills when the bench ends, in whichever way it ends. Only the
/// main thread may call this: the kernel's signal follows the end of the thread that forked.
pub(crate) fn spawn(mut command: Command) -> io::Result<Child> {
    let parent = Pid::this();
    // SAFETY: the closure makes two system calls; it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // If the parent ended before the call above, the kernel would not kill this child.
            if getppid() == parent {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    command.spawn()
}

/// Another process of this program, in another part, with which the bench exchanges lines.
pub(crate) struct Part {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Part {
    /// Starts it with these arguments. The first names the part.
    pub(crate) fn start(arguments: &[&str]) -> Result<Self, BenchError> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = spawn(command)?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        Ok(Self {
            name: arguments.first().copied().unwrap_or_default().to_owned(),
            child,
            input,
            output,
        })
    }

    /// Writes to its standard input.
    pub(crate) fn write_text(&mut self, text: &str) -> Result<(), BenchError> {
        Ok(self
            .input
            .as_mut()
            .ok_or("its standard input is closed")?
            .write_all(text.as_bytes())?)
    }

    /// Closes its standard input.
    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    /// Reads its next line.
    pub(crate) fn next_line(&mut self) -> Result<String, BenchError> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            return Err(
                format!("the part `{}` has ended: {}", self.name, self.child.wait()?).into(),
            );
        }
        Ok(line.trim_end().to_owned())
    }

    /// Lets it end by itself: closes its standard input and waits.
    pub(crate) fn end(mut self) -> Result<(), BenchError> {
        self.close_input();
        let status = self.child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the part `{}`: {status}", self.name).into())
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Errors mean that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
