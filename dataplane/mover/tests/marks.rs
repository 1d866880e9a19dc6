//! The marks of this binary: they are in its notes, and who listens to one hears it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(unsafe_code, reason = "perf_event_open has no safe wrapper here")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::FromRawFd as _;
use std::process::Command;
use std::time::Duration;

use ramferry_engine::{DowntimeParts, Round};
use ramferry_mover::marks;

const PARTS: u64 = 11;

/// What a note says, as addresses in the file's own numbering.
#[derive(Debug)]
struct Note {
    location: u64,
    semaphore: u64,
    arguments: String,
}

/// The notes of this binary with our provider, by name.
fn notes() -> BTreeMap<String, Note> {
    let own = std::env::current_exe().unwrap();
    let output = Command::new("readelf").args(["--notes", "--wide"]).arg(own).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut notes = BTreeMap::new();
    for note in text.split("Provider: ramferry\n").skip(1) {
        let field = |name: &str| {
            let (_, rest) = note.split_once(name).unwrap_or_else(|| panic!("no {name} in {note}"));
            rest.split([',', '\n']).next().unwrap().trim().to_owned()
        };
        let address = |name| u64::from_str_radix(field(name).trim_start_matches("0x"), 16).unwrap();
        let found = Note {
            location: address("Location:"),
            semaphore: address("Semaphore:"),
            arguments: field("Arguments:"),
        };
        notes.insert(field("Name:"), found);
    }
    notes
}

/// Where in the file an address of it is, from how this process has it mapped.
fn offset_of(address: u64) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let own = std::env::current_exe().unwrap().display().to_string();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let mappings: Vec<(u64, u64, u64)> = maps
        .lines()
        .filter(|line| line.ends_with(&own))
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, end) = fields[0].split_once('-').unwrap();
            (hex(start), hex(end), hex(fields[2]))
        })
        .collect();
    let address = mappings[0].0 + address;
    let (start, _, offset) =
        mappings.iter().find(|(start, end, _)| (*start..*end).contains(&address)).unwrap();
    address - start + offset
}

/// Listens to a mark in this thread; counts until dropped.
struct Listener(File);

impl Listener {
    fn to(note: &Note) -> std::io::Result<Self> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            kind: u32,
            size: u32,
            config: u64,
            sample: [u64; 3],
            flags: u64,
            wakeup: [u32; 2],
            path: u64,
            offset: u64,
            rest: [u64; 5],
        }
        let kind = std::fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")?;
        let path = CString::new(std::env::current_exe()?.to_str().unwrap()).unwrap();
        let attributes = Attributes {
            kind: kind.trim().parse().unwrap(),
            size: size_of::<Attributes>() as u32,
            config: offset_of(note.semaphore) << 32,
            path: path.as_ptr() as u64,
            offset: offset_of(note.location),
            ..Attributes::default()
        };
        // SAFETY: the structure is as large as it says (the layout of linux/perf_event.h up to its PERF_ATTR_SIZE_VER5),
        // and it and the path live until the call returns.
        let descriptor =
            unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, 0) };
        if descriptor < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(i32::try_from(descriptor).unwrap()) }))
    }

    fn heard(&mut self) -> u64 {
        let mut count = [0; 8];
        self.0.read_exact(&mut count).unwrap();
        u64::from_ne_bytes(count)
    }
}

fn mark_everything() {
    marks::window_registered(1 << 20, Duration::from_micros(3));
    let round = Round {
        number: 1,
        transferred_bytes: 4096,
        zero_bytes: 0,
        elapsed: Duration::from_millis(2),
        dirtied_bytes: 0,
    };
    marks::round_done(&round);
    marks::switchover_done(Duration::from_millis(12), &DowntimeParts::default());
}

#[test]
fn marks_are_in_the_notes_and_are_heard_by_who_listens() {
    let notes = notes();
    let names: Vec<_> = notes.keys().map(String::as_str).collect();
    assert_eq!(names, ["round_done", "switchover_done", "switchover_part", "window_registered"]);
    assert_eq!(notes["round_done"].arguments.split(' ').count(), 3, "{notes:?}");
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: probes need root");
        return;
    }
    mark_everything();
    for (name, times) in
        [("window_registered", 1), ("round_done", 1), ("switchover_done", 1), ("switchover_part", PARTS)]
    {
        let mut listener = Listener::to(&notes[name]).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(listener.heard(), 0, "{name}");
        mark_everything();
        mark_everything();
        assert_eq!(listener.heard(), 2 * times, "{name}");
    }
}
