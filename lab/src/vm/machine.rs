//! The command line of the lab VM's QEMU.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::job::{OUT_TAG, PORT, Session};
use super::kernel::KernelFiles;
use super::{Ends, Vm};
use crate::qemu::keeper;

const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU, with its end of the line as standard input and of the console as standard output: it inherits nothing else, and
/// both end with it.
pub(super) fn command(vm: &Vm, kernel: &KernelFiles, session: &Session, ends: Ends) -> Command {
    let mut command = keeper::command(Path::new(PROGRAM));
    // TCG carries out `rep stosb` byte by byte: with it, the kernel takes 60 us to clear a page, eight times what it
    // takes with `rep stosq`.
    command.args(["-machine", "q35", "-cpu", "max,-erms"]);
    command.args(clock(vm));
    command.args(["-smp", &vm.processors.to_string(), "-m", &format!("{}M", vm.memory_mib)]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&kernel.initramfs);
    command.args(["-append", &command_line(vm)]);
    command.args(["-chardev", "socket,id=console,fd=1", "-serial", "chardev:console"]);
    command.args(["-chardev", "socket,id=line,fd=0", "-device", "virtio-serial-pci"]);
    command.args(["-device", &format!("virtserialport,chardev=line,name={PORT}")]);
    command.arg("-virtfs").arg(share(Path::new("/"), "host", true));
    command.arg("-virtfs").arg(share(session.path(), "session", true));
    if let Some(out) = &vm.out {
        command.arg("-virtfs").arg(share(out, OUT_TAG, false));
    }
    command.stdin(ends.line).stdout(ends.console).stderr(Stdio::piped());
    command
}

/// QEMU counts instructions only where one thread emulates all processors. `shift` is the binary logarithm of an instruction's
/// nanoseconds; with `sleep`, a VM that waits does so in the host's time, as what it waits for (its files, its command line) comes
/// from there.
fn clock(vm: &Vm) -> &'static [&'static str] {
    match vm.steady_clock {
        true => &["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=on"],
        false => &["-accel", "tcg,thread=multi"],
    }
}

/// A kernel that reports an error in its own code is not to be trusted with the rest of a test: it ends at once.
fn command_line(vm: &Vm) -> String {
    let loud = if vm.shows_console { "loglevel=6" } else { "quiet" };
    format!("console=ttyS0 panic=-1 oops=panic reboot=t mitigations=off nokaslr {loud}")
}

fn share(path: &Path, tag: &str, read_only: bool) -> OsString {
    let mut option = OsString::from("local,path=");
    option.push(escaped(path.as_os_str()));
    option.push(format!(",mount_tag={tag},security_model=none,multidevs=remap"));
    if read_only {
        option.push(",readonly=on");
    }
    option
}

/// QEMU separates options by commas, and takes two for one.
fn escaped(text: &OsStr) -> OsString {
    let bytes =
        text.as_bytes().iter().flat_map(|&byte| std::iter::repeat_n(byte, if byte == b',' { 2 } else { 1 }));
    OsString::from_vec(bytes.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_in_a_path_is_no_option() {
        let option = share(Path::new("/tmp/a,b"), "out", false);
        assert_eq!(option, "local,path=/tmp/a,,b,mount_tag=out,security_model=none,multidevs=remap");
    }
}
