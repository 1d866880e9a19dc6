//! QEMUs to test against, and the far ends of their streams.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ramferry_guest::{GuestError, GuestInfo, Qemu, QmpClient, Side, Timeouts};
use ramferry_ram::RamFile;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// RAM of every guest: enough for its firmware.
pub(crate) const RAM_BYTES: u64 = 64 << 20;

/// What no test should have to wait for.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where an unpacked QEMU 10.0 has its wrapper, from the workspace's root.
const QEMU_10: &str = "target/qemu-10.0/qemu-system-x86_64";

/// The binaries to test with. One that is missing is reported, not used.
pub(crate) fn qemus() -> Vec<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let wanted = match std::env::var_os("RAMFERRY_TEST_QEMUS") {
        Some(list) => std::env::split_paths(&list).collect(),
        None => vec![PathBuf::from("qemu-system-x86_64"), workspace.join(QEMU_10)],
    };
    let runs = |binary: &PathBuf| {
        let output = Command::new(binary).arg("--version").stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => true,
            Ok(output) => skipped(format!("{} --version: {}", binary.display(), output.status)),
            Err(error) => skipped(format!("{}: {error}", binary.display())),
        }
    };
    wanted.into_iter().filter(runs).collect()
}

/// Reports that something was not tested.
pub(crate) fn skipped(why: impl std::fmt::Display) -> bool {
    eprintln!("SKIPPED: {why}");
    false
}

/// A QEMU of its own, with a directory of its own on tmpfs. Ended when dropped.
pub(crate) struct Vm {
    child: Child,
    /// A connection of the test's own.
    control: Option<QmpClient>,
    directory: TempDir,
    binary: PathBuf,
}

impl Vm {
    /// Starts `binary` with `arguments`, in which `@` stands for the guest's directory.
    pub(crate) async fn start(binary: &Path, arguments: &str) -> Self {
        let directory = TempDir::with_prefix_in("ramferry-guest-", "/dev/shm").unwrap();
        let at = directory.path().to_str().unwrap();
        let arguments = arguments.replace('@', at);
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let child = Command::new(binary)
            .args(["-accel", "kvm", "-accel", "tcg", "-nodefaults", "-display", "none"])
            .args(["-qmp", &format!("unix:{at}/qmp,server=on,wait=off")])
            .args(["-qmp", &format!("unix:{at}/control,server=on,wait=off")])
            .args(arguments.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut vm = Self { child, control: None, directory, binary: binary.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while vm.control.is_none() {
            match QmpClient::connect(&vm.path("control"), PATIENCE).await {
                Ok(control) => vm.control = Some(control),
                Err(error) => {
                    let ended = vm.child.try_wait().unwrap();
                    assert!(ended.is_none() && Instant::now() < deadline, "{error}: {}", vm.log());
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
        vm
    }

    /// A guest as a user would start it for us, and `more`.
    pub(crate) async fn guest(binary: &Path, more: &str) -> Self {
        let ram = "-machine q35,memory-backend=ram0 -m 64M -vga std \
                   -object memory-backend-file,id=ram0,size=64M,mem-path=@/ram,share=on";
        Self::start(binary, &format!("{ram} {more}")).await
    }

    /// A guest that waits for `self`'s guest, or one like it.
    pub(crate) async fn destination(&self, more: &str) -> Self {
        Self::guest(&self.binary, &format!("-incoming defer {more}")).await
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Whether QEMU has ended, or does so soon.
    pub(crate) async fn has_ended(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        true
    }

    /// Whether QEMU runs still.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) async fn inspect(&self, side: Side) -> Result<(Qemu, GuestInfo, Vec<RamFile>), GuestError> {
        Qemu::inspect(&self.path("qmp"), side, Timeouts::default()).await
    }

    /// Ready to leave.
    pub(crate) async fn source(&self) -> Qemu {
        let (qemu, _, _) = self.inspect(Side::Source).await.unwrap();
        qemu.prepare_source().await.unwrap();
        qemu
    }

    /// Runs a command on the test's own connection.
    pub(crate) async fn ask(&self, command: &str, arguments: Value) -> Value {
        self.try_ask(command, arguments).await.unwrap()
    }

    pub(crate) async fn try_ask(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, ramferry_guest::QmpError> {
        self.control().execute(command, arguments).await
    }

    pub(crate) fn control(&self) -> &QmpClient {
        self.control.as_ref().unwrap()
    }

    pub(crate) async fn run_state(&self) -> String {
        self.ask("query-status", json!({})).await["status"].as_str().unwrap().to_owned()
    }

    /// Waits until the guest is in `wanted`.
    pub(crate) async fn reaches(&self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.run_state().await != wanted {
            assert!(Instant::now() < deadline, "not {wanted}: {}", self.run_state().await);
        }
    }

    /// Waits until QEMU's own migration is in `wanted`.
    pub(crate) async fn migration_reaches(&self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let migration = self.ask("query-migrate", json!({})).await;
            if migration["status"] == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "not {wanted}: {migration}");
        }
    }

    /// Everything that a migration may change and must put back.
    pub(crate) async fn settings(&self) -> (Value, Value) {
        let mut capabilities = self.ask("query-migrate-capabilities", json!({})).await;
        capabilities.as_array_mut().unwrap().sort_by_key(|entry| entry["capability"].to_string());
        let parameters = self.ask("query-migrate-parameters", json!({})).await;
        (capabilities, parameters["max-bandwidth"].clone())
    }

    /// The reason why the guest, whose connection is `qemu`, may not be migrated now.
    pub(crate) async fn inspect_again(&self, qemu: &Qemu) -> &'static str {
        let (path, _listener) = self.listen();
        qemu.pause_for_switchover(&path).await.unwrap_err().reason()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Ends QEMU as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Listens for this guest's device state.
    pub(crate) fn listen(&self) -> (PathBuf, UnixListener) {
        let path = self.path("leaving");
        let _ = std::fs::remove_file(&path);
        (path.clone(), UnixListener::bind(&path).unwrap())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Devices with so much state that it does not fit into a socket's buffer.
pub(crate) fn large_devices() -> String {
    "-device e1000e ".repeat(6)
}

/// Breaks every connection to the QMP socket that is under test, at QEMU's end.
pub(crate) fn cut_qmp(vm: &Vm) {
    let pid = rustix::process::Pid::from_raw(vm.pid().try_into().unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let wanted = rustix::net::SocketAddrUnix::new(vm.path("qmp")).unwrap();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap() {
        let number = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let Ok(socket) = rustix::process::pidfd_getfd(&pidfd, number, flags) else { continue };
        let Ok(own) = rustix::net::getsockname(&socket) else { continue };
        let connected = rustix::net::getpeername(&socket).is_ok();
        if connected
            && rustix::net::SocketAddrUnix::try_from(own).is_ok_and(|own| own.path() == wanted.path())
        {
            rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).unwrap();
        }
    }
}

/// What the far end of a stream does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FarEnd {
    /// Reads everything and never answers.
    Reads,
    /// Accepts, and reads nothing.
    Stuck,
    /// Reads everything until it is told to stop; then nothing.
    Gate,
}

/// The far end of a stream, until dropped, which closes it.
pub(crate) struct Stream {
    task: JoinHandle<()>,
    open: tokio::sync::watch::Sender<bool>,
}

impl Stream {
    pub(crate) fn accept(listener: UnixListener, far_end: FarEnd) -> Self {
        let (open, mut gate) = tokio::sync::watch::channel(far_end != FarEnd::Stuck);
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = vec![0; 1 << 16];
            loop {
                gate.wait_for(|open| *open).await.unwrap();
                tokio::select! {
                    read = stream.read(&mut buffer) => {
                        if !matches!(read, Ok(1..)) {
                            break;
                        }
                    }
                    _ = gate.changed() => {}
                }
            }
            // Open until the test drops it.
            std::future::pending::<()>().await;
        });
        Self { task, open }
    }

    /// Stops reading.
    pub(crate) fn shut(&self) {
        self.open.send_replace(false);
    }

    /// Closes, and returns when that has been done.
    pub(crate) async fn close(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Carries device state from the one who connects to `listener` to the one who
/// listens at `destination`, and answers back. Counts what went forward.
pub(crate) fn carry(listener: UnixListener, destination: PathBuf) -> JoinHandle<u64> {
    tokio::spawn(async move {
        let (source, _) = listener.accept().await.unwrap();
        let destination = UnixStream::connect(destination).await.unwrap();
        let ((mut from_source, mut to_source), (mut from_destination, mut to_destination)) =
            (source.into_split(), destination.into_split());
        let back = tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_destination, &mut to_source).await;
            let _ = to_source.shutdown().await;
        });
        let mut forward_bytes = 0;
        let mut buffer = vec![0; 1 << 16];
        while let Ok(length @ 1..) = from_source.read(&mut buffer).await {
            forward_bytes += length as u64;
            if to_destination.write_all(&buffer[..length]).await.is_err() {
                break;
            }
        }
        let _ = to_destination.shutdown().await;
        let _ = back.await;
        forward_bytes
    })
}
