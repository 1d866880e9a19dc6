//! A QEMU that runs one guest, and goes away with everything it made.

pub(crate) mod keeper;
pub(crate) mod memory;
mod monitor;
pub(crate) mod serial;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::debian::DebianGuest;
use crate::proof::{self, PAGE_BYTES, Tick, Verified, Workload};
use crate::scratch::Scratch;
use memory::{Backing, Plan, RamBlock};
use monitor::Monitor;
use serial::{Line, Serial};

const START_TIMEOUT: Duration = Duration::from_secs(20);
const SHARED_MEMORY: &str = "/dev/shm";

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The processor, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// Those that this machine has.
    pub fn available() -> Vec<Accel> {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if kvm { vec![Accel::Kvm, Accel::Tcg] } else { vec![Accel::Tcg] }
    }

    /// KVM where there is KVM.
    pub fn best() -> Accel {
        Accel::available()[0]
    }
}

/// QEMU's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// `q35`
    Q35,
    /// `pc`
    Pc,
}

/// What the machine boots.
#[derive(Clone, Debug)]
pub enum Guest {
    /// The guest that proves itself.
    Proof(Workload),
    /// Debian's kernel with `stress`.
    Debian(DebianGuest),
    /// Firmware only.
    Nothing,
}

/// How to start a [`Qemu`].
#[derive(Clone, Debug)]
pub struct QemuBuilder {
    binary: PathBuf,
    accel: Accel,
    machine: Machine,
    machine_version: Option<String>,
    vcpus: u32,
    blocks: Vec<RamBlock>,
    guest: Guest,
    incoming: bool,
    paused: bool,
    arguments: Vec<String>,
}

impl QemuBuilder {
    /// The program; `qemu-system-x86_64` unless said.
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = path.into();
        self
    }

    /// [`Accel::best`] unless said; Debian's kernel is better served by TCG.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// q35 unless said.
    #[must_use]
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// A versioned machine, such as `7.2` for `pc-q35-7.2`.
    #[must_use]
    pub fn machine_version(mut self, version: impl Into<String>) -> Self {
        self.machine_version = Some(version.into());
        self
    }

    /// 1 unless said.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// One memory backend more; one node of 512 MiB on tmpfs unless said.
    #[must_use]
    pub fn block(mut self, block: RamBlock) -> Self {
        self.blocks.push(block);
        self
    }

    /// The guest that proves itself.
    #[must_use]
    pub fn proof(self, workload: Workload) -> Self {
        self.guest(Guest::Proof(workload))
    }

    /// What the machine boots; nothing unless said.
    #[must_use]
    pub fn guest(mut self, guest: Guest) -> Self {
        self.guest = guest;
        self
    }

    /// `-incoming defer`: a destination.
    #[must_use]
    pub fn incoming(mut self, incoming: bool) -> Self {
        self.incoming = incoming;
        self
    }

    /// `-S`: the guest runs, or a destination resumes, only when told to.
    #[must_use]
    pub fn paused(mut self, paused: bool) -> Self {
        self.paused = paused;
        self
    }

    /// One more argument for QEMU.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Starts QEMU and waits until it answers on QMP. The guest may still boot.
    pub fn start(mut self) -> Result<Qemu> {
        if self.blocks.is_empty() {
            self.blocks.push(RamBlock::node(512 << 20));
        }
        let plan = Plan::new(&self.blocks, self.machine)?;
        let scratch = Scratch::new(&std::env::temp_dir())?;
        let ram = Scratch::new(Path::new(SHARED_MEMORY))?;
        let huge = self.blocks.iter().find_map(|block| match &block.backing {
            Backing::HugeTlbfs(mount) => Some(Scratch::new(mount)),
            _ => None,
        });
        let huge = huge.transpose()?;
        let files = plan.files(&ram, huge.as_ref());

        let serial = Serial::listen(&scratch.join("serial"))?;
        let mut command = keeper::command(&self.binary);
        command.args(self.machine_arguments());
        command.args(plan.arguments(ram.path(), &files)?);
        command.args(self.guest_arguments(&scratch, &plan)?);
        command.args(device_arguments(&scratch));
        command.args(&self.arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
            .stderr(File::create(scratch.join("stderr")).context("cannot make a file in a new directory")?);
        let child = keeper::spawn(command)?;

        let mut qemu = Qemu {
            child: Mutex::new(child),
            monitor: Mutex::new(None),
            serial,
            plan,
            files,
            builder: self,
            scratch,
            _ram: ram,
            _huge: huge,
        };
        let monitor = Monitor::connect(&qemu.scratch.join("qmp-test"), START_TIMEOUT, || qemu.check_alive())
            .with_context(|| format!("QEMU did not start: {}", qemu.stderr()))?;
        qemu.monitor = Mutex::new(Some(monitor));
        Ok(qemu)
    }

    fn machine_arguments(&self) -> Vec<String> {
        let machine = match (self.machine, &self.machine_version) {
            (Machine::Q35, None) => "q35".to_owned(),
            (Machine::Q35, Some(version)) => format!("pc-q35-{version}"),
            (Machine::Pc, None) => "pc".to_owned(),
            (Machine::Pc, Some(version)) => format!("pc-i440fx-{version}"),
        };
        let accel = match self.accel {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        };
        let vcpus = self.vcpus.to_string();
        let mut arguments: Vec<String> = ["-machine", &machine, "-accel", accel, "-smp", &vcpus]
            .into_iter()
            .chain(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .map(str::to_owned)
            .collect();
        if self.incoming {
            arguments.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        if self.paused {
            arguments.push("-S".to_owned());
        }
        arguments
    }

    fn guest_arguments(&self, scratch: &Scratch, plan: &Plan) -> Result<Vec<String>> {
        match &self.guest {
            Guest::Nothing => Ok(Vec::new()),
            Guest::Debian(guest) => Ok(guest.arguments()),
            Guest::Proof(workload) => {
                let image = scratch.join("guest.elf");
                fs::write(&image, proof::IMAGE).context("cannot write the guest's image")?;
                // qboot hands over in a tenth of a second; SeaBIOS takes seconds where
                // a nested hypervisor emulates real mode.
                let arguments = ["-bios", "qboot.rom", "-kernel", &image.display().to_string(), "-append"];
                let command_line = workload.command_line(&plan.dimms());
                Ok(arguments.into_iter().map(str::to_owned).chain([command_line]).collect())
            }
        }
    }
}

fn device_arguments(scratch: &Scratch) -> [String; 8] {
    let socket = |name: &str| scratch.join(name).display().to_string();
    [
        "-chardev".to_owned(),
        format!("socket,id=serial0,path={}", socket("serial")),
        "-serial".to_owned(),
        "chardev:serial0".to_owned(),
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", socket("qmp")),
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", socket("qmp-test")),
    ]
}

/// A running QEMU. Dropping it kills and reaps it, and removes its files.
///
/// Fields are dropped in order: QEMU ends before what it uses is removed.
#[derive(Debug)]
pub struct Qemu {
    child: Mutex<Child>,
    monitor: Mutex<Option<Monitor>>,
    serial: Serial,
    plan: Plan,
    files: Vec<Option<PathBuf>>,
    builder: QemuBuilder,
    scratch: Scratch,
    _ram: Scratch,
    _huge: Option<Scratch>,
}

impl Qemu {
    /// Starts from the defaults: q35, 1 vCPU, 512 MiB on tmpfs, nothing to boot.
    pub fn builder() -> QemuBuilder {
        QemuBuilder {
            binary: PathBuf::from("qemu-system-x86_64"),
            accel: Accel::best(),
            machine: Machine::Q35,
            machine_version: None,
            vcpus: 1,
            blocks: Vec::new(),
            guest: Guest::Nothing,
            incoming: false,
            paused: false,
            arguments: Vec::new(),
        }
    }

    /// A destination for this guest: the same machine, with `-incoming defer` and `-S`.
    pub fn destination(&self) -> QemuBuilder {
        self.builder.clone().incoming(true).paused(true)
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.lock_child().id()
    }

    /// The QMP socket for the product. It serves one client, and the fixture is never that one.
    pub fn qmp_path(&self) -> PathBuf {
        self.scratch.join("qmp")
    }

    /// A directory that is removed with the fixture, for the test's own sockets and files.
    pub fn directory(&self) -> &Path {
        self.scratch.path()
    }

    /// Executes one QMP command, such as `json!({"execute": "stop"})`, on the test's own socket.
    pub fn qmp(&self, command: &Value) -> Result<Value> {
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        monitor.as_mut().context("QEMU is still starting")?.execute(command)
    }

    /// The events that came on the test's own socket since the last call; those
    /// that came before `command` was answered.
    pub fn qmp_events(&self) -> Result<Vec<Value>> {
        // An answer comes after every event that was there before it.
        self.qmp(&json!({ "execute": "query-status" }))?;
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(monitor.as_mut().context("QEMU is still starting")?.take_events())
    }

    /// `running`, `paused`, `inmigrate`, `postmigrate`, ... as `query-status` says.
    pub fn status(&self) -> Result<String> {
        let status = self.qmp(&json!({ "execute": "query-status" }))?;
        Ok(status["status"].as_str().context("query-status without a status")?.to_owned())
    }

    /// Pauses the guest's processors.
    pub fn stop(&self) -> Result<()> {
        self.qmp(&json!({ "execute": "stop" })).map(drop)
    }

    /// Lets the guest run.
    pub fn cont(&self) -> Result<()> {
        self.qmp(&json!({ "execute": "cont" })).map(drop)
    }

    /// The RAM file of each block, in the order they were given; none where it has no name.
    pub fn ram_files(&self) -> &[Option<PathBuf>] {
        &self.files
    }

    /// Which block holds a guest-physical address, and where in it.
    pub fn locate(&self, guest_address: u64) -> Option<(usize, u64)> {
        self.plan.locate(guest_address)
    }

    /// Reads the page at that guest-physical address from its RAM file.
    pub fn read_page(&self, guest_address: u64) -> Result<Vec<u8>> {
        let (file, offset) = self.open_at(guest_address)?;
        let mut page = vec![0; PAGE_BYTES as usize];
        file.read_exact_at(&mut page, offset).context("cannot read the RAM file")?;
        Ok(page)
    }

    /// Overwrites RAM at that guest-physical address behind the guest's back.
    pub fn write_ram(&self, guest_address: u64, bytes: &[u8]) -> Result<()> {
        let (file, offset) = self.open_at(guest_address)?;
        file.write_all_at(bytes, offset).context("cannot write the RAM file")
    }

    fn open_at(&self, guest_address: u64) -> Result<(File, u64)> {
        let (block, offset) = self.locate(guest_address).context("no RAM at that address")?;
        let path = self.files[block].as_ref().context("the block's file has no name")?;
        let file = OpenOptions::new().read(true).write(true).open(path);
        Ok((file.with_context(|| format!("cannot open {}", path.display()))?, offset))
    }

    /// Everything the guest printed so far.
    pub fn lines(&self) -> Vec<Line> {
        self.serial.lines()
    }

    /// What it printed after its last end of line.
    pub fn partial_line(&self) -> String {
        self.serial.partial()
    }

    /// How many lines it printed: where [`Qemu::wait_line_from`] may begin.
    pub fn line_count(&self) -> usize {
        self.serial.count()
    }

    /// The first line that `wanted` accepts, already printed or still to come.
    pub fn wait_line(&self, wanted: impl FnMut(&str) -> bool, timeout: Duration) -> Result<Line> {
        self.wait_line_from(0, wanted, timeout)
    }

    /// The same, passing over the first `from` lines.
    pub fn wait_line_from(
        &self,
        from: usize,
        mut wanted: impl FnMut(&str) -> bool,
        timeout: Duration,
    ) -> Result<Line> {
        self.wait_value(from, timeout, |line| wanted(&line.text).then(|| line.clone()))
    }

    /// The same, for a line that parses.
    pub fn wait_value<T>(
        &self,
        from: usize,
        timeout: Duration,
        wanted: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        self.serial.wait(from, timeout, wanted).map_err(|error| match self.stderr() {
            stderr if stderr.is_empty() => error,
            stderr => error.context(format!("QEMU said: {stderr}")),
        })
    }

    /// Waits until the guest that proves itself has filled its memory.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let line = self.wait_line(
            |line| ["READY", "REFUSED", "FAULT"].iter().any(|word| line.starts_with(word)),
            timeout,
        )?;
        ensure!(line.text.starts_with("READY"), "the guest does not run: {}", line.text);
        Ok(())
    }

    /// The next tick that has not been printed yet.
    pub fn next_tick(&self, timeout: Duration) -> Result<Tick> {
        self.wait_value(self.line_count(), timeout, |line| Tick::parse(&line.text))
    }

    /// Every tick so far, with the moment it arrived.
    pub fn ticks(&self) -> Vec<(Instant, Tick)> {
        ticks_of(&self.lines())
    }

    /// Sends a command byte: `v` verify everything, `p` stop writing, `r` write again.
    pub fn command(&self, byte: u8) -> Result<()> {
        self.serial.send(&[byte])
    }

    /// Has the guest check every page that it ever wrote.
    pub fn verify(&self, timeout: Duration) -> Result<Verified> {
        let from = self.line_count();
        self.command(b'v')?;
        self.wait_value(from, timeout, |line| Verified::parse(&line.text))
    }

    /// Has the guest stop writing; it goes on ticking.
    pub fn pause_writing(&self, timeout: Duration) -> Result<()> {
        let from = self.line_count();
        self.command(b'p')?;
        self.wait_line_from(from, |line| line.starts_with("PAUSED"), timeout).map(drop)
    }

    /// Has the guest write again.
    pub fn resume_writing(&self, timeout: Duration) -> Result<()> {
        let from = self.line_count();
        self.command(b'r')?;
        self.wait_line_from(from, |line| line.starts_with("RESUMED"), timeout).map(drop)
    }

    /// What QEMU wrote to its standard error.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.scratch.join("stderr")).unwrap_or_default().trim().to_owned()
    }

    /// True until QEMU exits.
    pub fn is_alive(&self) -> bool {
        self.check_alive().is_ok()
    }

    /// Waits until QEMU exits by itself.
    pub fn wait_exit(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while self.is_alive() {
            if Instant::now() > deadline {
                bail!("QEMU still runs after {timeout:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Kills QEMU as a crash would. Its RAM files stay until the fixture goes.
    pub fn kill(&self) -> Result<()> {
        let mut child = self.lock_child();
        child.kill().context("cannot kill QEMU")?;
        child.wait().context("cannot wait for QEMU").map(drop)
    }

    fn check_alive(&self) -> Result<()> {
        match self.lock_child().try_wait().context("cannot wait for QEMU")? {
            None => Ok(()),
            Some(status) => Err(anyhow!("QEMU ended with {status}")),
        }
    }

    fn lock_child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let mut child = self.lock_child();
        // It may have exited by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn ticks_of(lines: &[Line]) -> Vec<(Instant, Tick)> {
    lines.iter().filter_map(|line| Some((line.at, Tick::parse(&line.text)?))).collect()
}

/// What a guest printed across its move: a line that was cut by the move is whole again.
pub fn joined_lines(source: &Qemu, destination: &Qemu) -> Vec<Line> {
    let mut lines = source.lines();
    let mut rest = destination.lines().into_iter();
    if let Some(first) = rest.next() {
        lines.push(Line { at: first.at, text: source.partial_line() + &first.text });
    }
    lines.extend(rest);
    lines
}

/// How long the guest was silent across its move, less its own time between those two ticks.
///
/// None until the destination has printed a tick.
pub fn downtime_seen(source: &Qemu, destination: &Qemu) -> Option<Duration> {
    let before = *source.ticks().last()?;
    let ticks = ticks_of(&joined_lines(source, destination));
    let after = ticks.into_iter().find(|(at, tick)| *at > before.0 && tick.n > before.1.n)?;
    let own = Duration::from_micros(after.1.us.saturating_sub(before.1.us));
    Some(after.0.duration_since(before.0).saturating_sub(own))
}
