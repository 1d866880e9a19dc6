//! An unmodified QEMU, with a guest that writes all the time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ramferry_tracking::remote_call::{Faults, remote_userfaultfd};
use ramferry_tracking::{TrackerKind, arm, check};

use crate::file::{PAGE, RamFile, members, sets};
use crate::helper::{state, status};
use crate::kinds::works;

const RAM_BYTES: u64 = 64 << 20;

/// Firmware that counts for ever, and writes the count to each page from 128 KiB
/// to 576 KiB on every pass.
const GUEST: [u8; 28] = [
    0xfa, //                               cli
    0x66, 0x31, 0xdb, //                   xor ebx, ebx
    0x66, 0x43, //                  pass:  inc ebx
    0xb8, 0x00, 0x20, //                   mov ax, 0x2000
    0x8e, 0xc0, //                  page:  mov es, ax
    0x26, 0x66, 0x89, 0x1e, 0, 0, //       mov [es:0], ebx
    0x05, 0x00, 0x01, //                   add ax, 0x100
    0x3d, 0x00, 0x90, //                   cmp ax, 0x9000
    0x72, 0xf0, //                         jb page
    0xeb, 0xe9, //                         jmp pass
    0x90, //                               nop
];
/// At the reset vector: jmp 0xf000:0
const RESET: [u8; 5] = [0xea, 0x00, 0x00, 0x00, 0xf0];
const FIRST_PAGE: u64 = 0x20000 / PAGE;
const LAST_PAGE: u64 = 0x90000 / PAGE;

struct Vm {
    child: Child,
    monitor: BufReader<UnixStream>,
    _directory: tempfile::TempDir,
}

impl Vm {
    /// None where QEMU does not run so.
    fn boot(ram: &RamFile, accelerator: &str, sandbox: &str) -> Option<Self> {
        if accelerator == "kvm" && !Path::new("/dev/kvm").exists() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let firmware = directory.path().join("firmware");
        let mut rom = vec![0; 64 << 10];
        rom[..GUEST.len()].copy_from_slice(&GUEST);
        rom[0xfff0..0xfff5].copy_from_slice(&RESET);
        std::fs::write(&firmware, rom).unwrap();
        let socket = directory.path().join("qmp");
        let backend = format!("memory-backend-file,id=ram,size={RAM_BYTES},share=on,mem-path={}", ram.path());
        let mut child = Command::new("qemu-system-x86_64")
            .args([
                "-accel",
                accelerator,
                "-machine",
                "pc,memory-backend=ram",
                "-m",
                "64M",
                "-object",
                &backend,
            ])
            .args(["-bios", &firmware.display().to_string()])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(["-sandbox", sandbox, "-display", "none", "-nodefaults", "-vga", "none"])
            .stdin(Stdio::null())
            .spawn()
            .ok()?;
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                break stream;
            }
            if child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(Instant::now() < deadline, "QEMU offers no monitor");
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut vm = Self { child, monitor: BufReader::new(stream), _directory: directory };
        vm.execute("qmp_capabilities");
        Some(vm)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn execute(&mut self, command: &str) -> String {
        writeln!(self.monitor.get_mut(), "{{\"execute\": \"{command}\"}}").unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.monitor.read_line(&mut line).unwrap(), 0, "QEMU ended");
            assert!(!line.contains("\"error\""), "{line}");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn count(ram: &RamFile, page: u64) -> u32 {
    let mut count = [0; 4];
    ram.file.read_exact_at(&mut count, page * PAGE).unwrap();
    u32::from_le_bytes(count)
}

fn await_progress(ram: &RamFile) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let before = count(ram, LAST_PAGE - 1);
    while count(ram, LAST_PAGE - 1) == before {
        assert!(Instant::now() < deadline, "the guest writes no more");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn migrate_ram_of(accelerator: &str, sandbox: &str, kind: TrackerKind) {
    if !works(kind) {
        return;
    }
    let ram = RamFile::new(RAM_BYTES / PAGE);
    let Some(mut vm) = Vm::boot(&ram, accelerator, sandbox) else {
        eprintln!("SKIPPED: QEMU does not run with -accel {accelerator} -sandbox {sandbox}");
        return;
    };
    await_progress(&ram);
    let writers = check(vm.pid(), &[ram.tracked()]).unwrap();
    assert!(writers.iter().all(|writer| writer.obstacle.is_none()), "{writers:?}");

    let mut tracker = arm(Some(kind), vm.pid(), &[ram.tracked()]).unwrap();
    let page = |page: u64| {
        let mut bytes = vec![0; PAGE as usize];
        ram.file.read_exact_at(&mut bytes, page * PAGE).unwrap();
        bytes
    };
    let mut replica: Vec<Vec<u8>> = (0..ram.pages).map(page).collect();
    let mut reported = 0;
    let mut harvest = |replica: &mut Vec<Vec<u8>>| {
        let mut written = sets(&[&ram]);
        tracker.recheck(&mut written).unwrap();
        tracker.harvest(&mut written).unwrap();
        let pages = members(&written, 0);
        pages.iter().for_each(|written| replica[*written as usize] = page(*written));
        pages
    };
    for _ in 0..50 {
        await_progress(&ram);
        reported +=
            harvest(&mut replica).iter().filter(|page| (FIRST_PAGE..LAST_PAGE).contains(page)).count();
    }
    assert!(reported > 500, "{reported} pages reported");
    vm.execute("stop");
    harvest(&mut replica);
    let lost: Vec<u64> = (0..ram.pages).filter(|number| replica[*number as usize] != page(*number)).collect();
    assert_eq!(lost, [0; 0]);
    assert_eq!(harvest(&mut replica), [0; 0]);
    vm.execute("cont");
    await_progress(&ram);
    drop(tracker);
    await_progress(&ram);
    assert_eq!(status(vm.pid(), "TracerPid"), "0");
    assert!(matches!(state(vm.pid()), 'S' | 'R'));
    assert!(vm.execute("query-status").contains("running"));
}

#[test]
fn ram_of_a_kvm_guest_is_tracked_without_a_loss() {
    migrate_ram_of("kvm", "off", TrackerKind::UffdWp);
    migrate_ram_of("kvm", "off", TrackerKind::SoftDirty);
}

#[test]
fn ram_of_an_emulated_guest_is_tracked_without_a_loss() {
    migrate_ram_of("tcg", "off", TrackerKind::UffdWp);
    migrate_ram_of("tcg", "off", TrackerKind::SoftDirty);
}

#[test]
fn a_sandboxed_vmm_is_tracked_too() {
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    migrate_ram_of("tcg", sandbox, TrackerKind::UffdWp);
}

#[test]
fn every_thread_of_a_vmm_can_be_borrowed_while_its_guest_runs() {
    let ram = RamFile::new(RAM_BYTES / PAGE);
    let accelerator = if Path::new("/dev/kvm").exists() { "kvm" } else { "tcg" };
    let Some(mut vm) = Vm::boot(&ram, accelerator, "off") else {
        eprintln!("SKIPPED: QEMU does not run with -accel {accelerator}");
        return;
    };
    await_progress(&ram);
    for _ in 0..50 {
        for tid in std::fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap() {
            let tid: u32 = tid.unwrap().file_name().to_str().unwrap().parse().unwrap();
            // Threads that the kernel runs in there never call: another is then borrowed.
            remote_userfaultfd(tid, Faults::All).unwrap();
        }
        assert!(vm.execute("query-status").contains("running"));
        await_progress(&ram);
    }
    assert_eq!(status(vm.pid(), "TracerPid"), "0");
}
