//! This test program once more, as a process that does as it is told.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ramferry_ram::FileIdentity;
use ramferry_tracking::{TrackedFile, TrackerKind};
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use crate::file::{RamFile, Random, sets};

mod postcopy;

const ASKED: &str = "RAMFERRY_TRACKING_HELPER";

/// A helper process. Killed and reaped on drop.
pub(crate) struct Helper {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Helper {
    pub(crate) fn spawn() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["helper::serves_when_asked", "--exact", "--nocapture", "--test-threads=1"])
            .env(ASKED, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut helper = Self { child, orders, answers };
        assert_eq!(helper.order("hello"), "ok");
        helper
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order and waits until it was carried out.
    pub(crate) fn order(&mut self, order: &str) -> String {
        self.send(order);
        self.answer()
    }

    pub(crate) fn send(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    pub(crate) fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the helper ended");
            // The test harness may have begun the line.
            if let Some((_, answer)) = line.trim_end().split_once('@') {
                return answer.to_owned();
            }
        }
    }

    /// Maps pages of `file` from `first` on, writable, and writes to each once.
    pub(crate) fn map(&mut self, name: &str, file: &RamFile, first: u64, pages: u64) {
        self.map_as("rw", name, file, first, pages);
        self.order(&format!("write {name} 0 {pages} 1"));
    }

    /// Maps with `mode`: `rw`, `ro` (may become writable), `read` or `private`.
    pub(crate) fn map_as(&mut self, mode: &str, name: &str, file: &RamFile, first: u64, pages: u64) {
        let (path, page) = (file.path(), file.page_bytes);
        assert_eq!(self.order(&format!("map {mode} {name} {path} {first} {pages} {page}")), "ok");
    }

    /// Writes `stamp` to pages of a mapping, counted from its start.
    pub(crate) fn write(&mut self, name: &str, pages: &[u64], stamp: u64) {
        for page in pages {
            assert_eq!(self.order(&format!("write {name} {page} 1 {stamp}")), "ok");
        }
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// What `/proc/PID/status` says in `field`.
    pub(crate) fn status(&self, field: &str) -> String {
        status(self.pid(), field)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `/proc/PID/status` says in `field`.
pub(crate) fn status(pid: u32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap().trim().to_owned()
}

/// Whether any of the mappings of a process is write-protected by a userfaultfd.
pub(crate) fn protected(pid: u32) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.any(|flags| flags.split(' ').any(|flag| flag == "uw"))
}

/// The state letter of a process: `R`, `S`, `T`, `t`, `Z` and so on.
pub(crate) fn state(pid: u32) -> char {
    status(pid, "State").chars().next().unwrap()
}

#[test]
fn serves_when_asked() {
    if std::env::var_os(ASKED).is_none() {
        return;
    }
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let mut server = Server::default();
    for line in std::io::stdin().lines() {
        let answer = server.carry_out(&line.unwrap());
        let mut output = std::io::stdout().lock();
        writeln!(output, "@{answer}").unwrap();
        output.flush().unwrap();
    }
    std::process::exit(0);
}

#[derive(Clone)]
struct Mapped {
    file: Arc<File>,
    protection: ProtFlags,
    flags: MapFlags,
    offset: u64,
    address: usize,
    length: usize,
    page_bytes: u64,
}

impl Mapped {
    fn place(&self, page: u64) -> *mut u64 {
        let offset = (page * self.page_bytes) as usize;
        assert!(offset < self.length);
        (self.address + offset) as *mut u64
    }

    fn write(&self, page: u64, stamp: u64) {
        // SAFETY: within our own mapping, which nothing of Rust refers to.
        unsafe { self.place(page).write_volatile(stamp) };
    }
}

#[derive(Default)]
struct Server {
    mappings: HashMap<String, Mapped>,
    hammers: Vec<JoinHandle<()>>,
    spinner: Option<JoinHandle<Result<u64, String>>>,
    enough: Arc<AtomicBool>,
    child: Option<(File, File)>,
    opened: HashMap<String, File>,
    exercise: postcopy::Exercise,
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

impl Server {
    fn carry_out(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        match words[0] {
            "hello" => {}
            "map" => self.map(words[1], words[2], words[3], number(4), number(5), number(6)),
            "write" => {
                let mapped = &self.mappings[words[1]];
                (number(2)..number(2) + number(3)).for_each(|page| mapped.write(page, number(4)));
            }
            "unmap" => {
                let mapped = self.mappings.remove(words[1]).unwrap();
                // SAFETY: nothing refers to the mapping.
                unsafe { rustix::mm::munmap(mapped.address as *mut c_void, mapped.length) }.unwrap();
            }
            "open" => {
                let file = OpenOptions::new().read(true).write(true).open(words[2]).unwrap();
                self.opened.insert(words[1].to_owned(), file);
            }
            "open_to_read" => {
                self.opened.insert(words[1].to_owned(), File::open(words[2]).unwrap());
            }
            "close" => drop(self.opened.remove(words[1]).unwrap()),
            "write_file" => {
                use std::os::unix::fs::FileExt;
                self.opened[words[1]].write_all_at(b"by a system call", number(2)).unwrap();
            }
            "protect" => self.protect(words[1], words[2]),
            "move" => self.move_mapping(words[1]),
            "replace" => self.replace(words[1]),
            "forget" => self.forget(words[1], number(2), number(3)),
            "kernel_write" => self.kernel_write(words[1], number(2), number(3)),
            "hammer" => self.hammer(words[1], number(2)),
            "rest" => self.rest(),
            "fork" => return self.fork(words[1]),
            "child_write" => {
                let (orders, answers) = self.child.as_mut().unwrap();
                orders.write_all(&number(1).to_ne_bytes()).unwrap();
                std::io::Read::read_exact(answers, &mut [0]).unwrap();
            }
            "spin" => self.spin(),
            "spun" => return self.spun(),
            "nap" => return nap(number(1)),
            "poll" => return poll(number(1)),
            "count_signals" => count_signals(),
            "signals" => return SIGNALS.load(Ordering::Relaxed).to_string(),
            "drop_privileges" => drop_privileges(),
            "forbid_userfaultfd" => forbid_userfaultfd(),
            "userfaultfd" => {
                // SAFETY: takes a number and touches no memory.
                return unsafe { libc::syscall(libc::SYS_userfaultfd, 1) }.to_string();
            }
            "borrow" => borrow(number(1) as u32),
            "track" => track(words[1], number(2) as u32, &words[3..]),
            "read" => return postcopy::read(&self.mappings[words[1]], number(2)),
            "kernel_read" => return postcopy::kernel_read(&self.mappings[words[1]], number(2)),
            "split" => postcopy::split(&self.mappings[words[1]], number(2), number(3)),
            "exercise" => self.exercise.begin(&self.mappings[words[1]], number(2), number(3)),
            "exercised" => return self.exercise.end(),
            "serve" => {
                let (pid, path, owed) = (number(2) as u32, words[3], words[7]);
                postcopy::serve(words[1], pid, path, number(4), number(5), number(6), owed);
            }
            other => panic!("no such order: {other}"),
        }
        "ok".to_owned()
    }

    fn map(&mut self, mode: &str, name: &str, path: &str, first: u64, pages: u64, page_bytes: u64) {
        // A mapping that may become writable needs a descriptor that may be written to.
        let writable = ["rw", "ro"].contains(&mode);
        let file = OpenOptions::new().read(true).write(writable).open(path).unwrap();
        let (protection, flags) = match mode {
            "rw" => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED),
            "ro" | "read" => (ProtFlags::READ, MapFlags::SHARED),
            "private" => (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE),
            other => panic!("no such mode: {other}"),
        };
        let length = (pages * page_bytes) as usize;
        let offset = first * page_bytes;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), length, protection, flags, file.as_fd(), offset)
        };
        let address = address.unwrap() as usize;
        let file = Arc::new(file);
        let mapped = Mapped { file, protection, flags, offset, address, length, page_bytes };
        self.mappings.insert(name.to_owned(), mapped);
    }

    fn protect(&mut self, name: &str, mode: &str) {
        let mapped = &self.mappings[name];
        let protection = match mode {
            "rw" => MprotectFlags::READ | MprotectFlags::WRITE,
            _ => MprotectFlags::READ,
        };
        // SAFETY: our own mapping, to which nobody writes meanwhile.
        unsafe { rustix::mm::mprotect(mapped.address as *mut c_void, mapped.length, protection) }.unwrap();
    }

    fn move_mapping(&mut self, name: &str) {
        let mapped = self.mappings.get_mut(name).unwrap();
        let length = mapped.length;
        // SAFETY: a reservation to move to, then a move over it; nothing refers to either.
        unsafe {
            let none = ProtFlags::empty();
            let target = rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, none, MapFlags::PRIVATE);
            let (from, to) = (mapped.address as *mut c_void, target.unwrap());
            let moved = rustix::mm::mremap_fixed(from, length, length, MremapFlags::MAYMOVE, to).unwrap();
            mapped.address = moved as usize;
        }
    }

    fn replace(&mut self, name: &str) {
        let Mapped { file, protection, flags, offset, address, length, .. } = self.mappings[name].clone();
        // SAFETY: the same file at the place of our own mapping of it.
        let replaced = unsafe {
            rustix::mm::munmap(address as *mut c_void, length).unwrap();
            let flags = flags | MapFlags::FIXED;
            rustix::mm::mmap(address as *mut c_void, length, protection, flags, file.as_fd(), offset)
        };
        assert_eq!(replaced.unwrap() as usize, address);
    }

    fn forget(&mut self, name: &str, page: u64, pages: u64) {
        let mapped = &self.mappings[name];
        let length = (pages * mapped.page_bytes) as usize;
        // SAFETY: a shared mapping of a file: what is dropped is read again from it.
        unsafe { rustix::mm::madvise(mapped.place(page).cast(), length, Advice::LinuxDontNeed) }.unwrap();
    }

    fn kernel_write(&mut self, name: &str, page: u64, stamp: u64) {
        let (mut writer, mut bytes) = (std::io::pipe().unwrap(), [0; 8]);
        writer.1.write_all(&stamp.to_ne_bytes()).unwrap();
        let place = self.mappings[name].place(page);
        // SAFETY: eight bytes within our own mapping.
        let read = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&writer.0), place.cast(), 8) };
        assert_eq!(read, 8);
        bytes.copy_from_slice(&stamp.to_ne_bytes());
        drop(writer.0);
    }

    /// Threads that write to random pages as fast as they can, each a word of its own. Each has written when this returns.
    fn hammer(&mut self, name: &str, seed: u64) {
        self.enough.store(false, Ordering::Relaxed);
        let begun = Arc::new(Barrier::new(3));
        for thread in 0..2 {
            let (mapped, enough) = (self.mappings[name].clone(), Arc::clone(&self.enough));
            let begun = Arc::clone(&begun);
            self.hammers.push(std::thread::spawn(move || {
                let pages = mapped.length as u64 / mapped.page_bytes;
                let mut random = Random(seed + 1 + thread as u64);
                let mut stamp = seed << 32;
                while !enough.load(Ordering::Relaxed) {
                    stamp += 1;
                    let place = mapped.place(random.below(pages));
                    // SAFETY: word `1 + thread` of a page of our own mapping.
                    unsafe { place.add(1 + thread).write_volatile(stamp) };
                    if stamp & 0xffff_ffff == 1 {
                        begun.wait();
                    }
                }
            }));
        }
        begun.wait();
    }

    fn rest(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        self.hammers.drain(..).for_each(|hammer| hammer.join().unwrap());
    }

    /// A child that has inherited our mappings and writes to pages it is told.
    fn fork(&mut self, name: &str) -> String {
        let mapped = self.mappings[name].clone();
        let (orders, our_orders) = std::io::pipe().unwrap();
        let (our_answers, answers) = std::io::pipe().unwrap();
        // SAFETY: the child only makes system calls and writes to its mapping.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
            let mut page = [0; 8];
            while rustix::io::read(&orders, &mut page) == Ok(8) {
                mapped.write(u64::from_ne_bytes(page), 77);
                let _ = rustix::io::write(&answers, &[1]);
            }
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        use std::os::fd::OwnedFd;
        self.child = Some((OwnedFd::from(our_orders).into(), OwnedFd::from(our_answers).into()));
        pid.to_string()
    }

    /// A thread that computes without a system call, in every kind of register.
    fn spin(&mut self) {
        self.enough.store(false, Ordering::Relaxed);
        let enough = Arc::clone(&self.enough);
        self.spinner = Some(std::thread::spawn(move || {
            let rounds = AtomicU64::new(0);
            let expected = checksum();
            while !enough.load(Ordering::Relaxed) {
                let sum = checksum();
                if sum != expected {
                    return Err(format!("{sum:?} instead of {expected:?}"));
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            Ok(rounds.load(Ordering::Relaxed))
        }));
    }

    fn spun(&mut self) -> String {
        self.enough.store(true, Ordering::Relaxed);
        match self.spinner.take().unwrap().join().unwrap() {
            Ok(rounds) => format!("ok {rounds}"),
            Err(error) => error,
        }
    }
}

fn checksum() -> (u64, u64) {
    let (mut whole, mut real) = (std::hint::black_box(1u64), std::hint::black_box(1.5f64));
    for step in 0..1000u64 {
        whole = whole.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step);
        real = (real * 1.000_1 + step as f64).sqrt() + 1.0;
    }
    (whole, real.to_bits())
}

/// Sleeps without retrying: what the kernel returns, and whether it was long enough.
fn nap(milliseconds: u64) -> String {
    let length = Duration::from_millis(milliseconds);
    let request = libc::timespec { tv_sec: length.as_secs() as i64, tv_nsec: length.subsec_nanos().into() };
    let start = Instant::now();
    // SAFETY: reads one timespec, and may be told to write none.
    let result = unsafe { libc::nanosleep(&raw const request, std::ptr::null_mut()) };
    format!("{result} {}", start.elapsed() >= length)
}

fn poll(milliseconds: u64) -> String {
    let start = Instant::now();
    // SAFETY: an empty list of descriptors.
    let result = unsafe { libc::poll(std::ptr::null_mut(), 0, milliseconds as i32) };
    format!("{result} {}", start.elapsed() >= Duration::from_millis(milliseconds))
}

fn count_signals() {
    // SAFETY: an action of plain numbers, whose handler only adds to an atomic.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGRTMIN() + 3, &raw const action, std::ptr::null_mut()), 0);
    }
}

fn drop_privileges() {
    const NOBODY: u32 = 65534;
    // SAFETY: takes numbers and an empty list.
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setgid(NOBODY), 0);
        assert_eq!(libc::setuid(NOBODY), 0);
    }
}

/// From now on a call of userfaultfd kills the process.
fn forbid_userfaultfd() {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_userfaultfd as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` and the filter it points to live across the call, which copies them.
    let result = unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const program,
        )
    };
    assert_eq!(result, 0);
}

/// Tracks process `pid` and harvests until killed.
fn track(kind: &str, pid: u32, file: &[&str]) {
    let number = |index: usize| file[index].parse::<u64>().unwrap();
    let identity = FileIdentity { device: number(0), inode: number(1) };
    let tracked = TrackedFile { identity, pages: number(2), page_bytes: number(3) };
    let mut tracker =
        ramferry_tracking::arm(Some(kind.parse::<TrackerKind>().unwrap()), pid, &[tracked]).unwrap();
    std::thread::spawn(move || {
        let file = RamFile {
            file: tempfile::tempfile().unwrap(),
            pages: tracked.pages,
            page_bytes: tracked.page_bytes,
        };
        let mut written = sets(&[&file]);
        loop {
            tracker.harvest(&mut written).unwrap();
            tracker.recheck(&mut written).unwrap();
        }
    });
}

/// Borrows the first thread of `pid` again and again, until this process is killed.
fn borrow(pid: u32) {
    use ramferry_tracking::remote_call::{Faults, remote_userfaultfd};
    std::thread::spawn(move || {
        loop {
            remote_userfaultfd(pid, Faults::UserOnly).unwrap();
        }
    });
}
