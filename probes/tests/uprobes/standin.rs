//! Builds the stand-in and its caller, and drives the caller.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use ramferry_probes::{BOUNDS_US, Histogram};

/// Whether this process may use eBPF; says so where it may not.
pub(crate) fn may_probe() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: probes need root");
    }
    is_root
}

/// A directory with the library and the program.
pub(crate) struct Standin(tempfile::TempDir);

impl Standin {
    pub(crate) fn build() -> Self {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/uprobes");
        let standin = Self(tempfile::tempdir().unwrap());
        let versions = format!("-Wl,--version-script={}", sources.join("standin.map").display());
        let library = standin.library();
        let flags = ["-O2", "-Wall", "-Wextra", "-Werror"];
        gcc(&[&flags[..], &["-shared", "-fPIC", "-Wl,-soname,libibverbs.so.1", &versions]].concat())
            .arg("-o")
            .arg(&library)
            .arg(sources.join("standin.c"))
            .ended();
        gcc(&[&flags[..], &["-pthread", "-Wl,-rpath,$ORIGIN"]].concat())
            .arg("-o")
            .arg(standin.caller())
            .arg(sources.join("caller.c"))
            .arg(&library)
            .ended();
        standin
    }

    pub(crate) fn library(&self) -> PathBuf {
        self.0.path().join("libibverbs.so.1")
    }

    fn caller(&self) -> PathBuf {
        self.0.path().join("caller")
    }
}

fn gcc(flags: &[&str]) -> Command {
    let mut command = Command::new("gcc");
    command.args(flags);
    command
}

trait Ended {
    fn ended(&mut self);
}

impl Ended for Command {
    fn ended(&mut self) {
        let output = self.output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

/// How long one registration took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timed {
    pub(crate) inner_ns: u64,
    pub(crate) outer_ns: u64,
}

/// A process that uses the library; ended with the test.
pub(crate) struct Caller {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Caller {
    /// It has one region registered, and waits.
    pub(crate) fn start(standin: &Standin) -> Self {
        let mut child =
            Command::new(standin.caller()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut caller = Self { child, stdout };
        assert_eq!(caller.lines_until("ready"), 1);
        caller
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it do its work. Returns the times of its registrations by size.
    pub(crate) fn work(&mut self) -> BTreeMap<u64, Vec<Timed>> {
        self.go_on();
        let mut timed: BTreeMap<u64, Vec<Timed>> = BTreeMap::new();
        loop {
            let line = self.line();
            if line == "done" {
                return timed;
            }
            let numbers: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
            let [bytes, inner_ns, outer_ns] = numbers[..] else { panic!("{line}") };
            timed.entry(bytes).or_default().push(Timed { inner_ns, outer_ns });
        }
    }

    /// Has it end.
    pub(crate) fn end(&mut self) {
        self.go_on();
        assert!(self.child.wait().unwrap().success());
    }

    fn go_on(&mut self) {
        writeln!(self.child.stdin.as_mut().unwrap(), "go").unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "it ended");
        line.trim_end().to_owned()
    }

    fn lines_until(&mut self, last: &str) -> usize {
        (1..).find(|_| self.line() == last).unwrap()
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        // It has ended, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A probe measures less than who calls, and more than who is called: for each bound the calls that kept below it
/// lie between the two.
pub(crate) fn assert_between(histogram: &Histogram, timed: &[Timed], bytes: u64) {
    assert_eq!(histogram.count(), timed.len() as u64, "{bytes} bytes");
    let mut probed = 0;
    for (&us, &more) in BOUNDS_US.iter().zip(&histogram.slots) {
        probed += more;
        let below = |of: fn(&Timed) -> u64| timed.iter().filter(|call| of(call) <= us * 1000).count() as u64;
        let (outer, inner) = (below(|call| call.outer_ns), below(|call| call.inner_ns));
        assert!(outer <= probed && probed <= inner, "{bytes} bytes, {us} us: {outer} <= {probed} <= {inner}");
    }
    let (outer, inner): (u64, u64) =
        timed.iter().fold((0, 0), |sum, call| (sum.0 + call.outer_ns, sum.1 + call.inner_ns));
    let (outer, inner) = (Duration::from_nanos(outer), Duration::from_nanos(inner));
    assert!(
        inner <= histogram.sum && histogram.sum <= outer,
        "{inner:?} <= {:?} <= {outer:?}",
        histogram.sum
    );
}
