//! Builds the self-proving guest: freestanding code for the machine QEMU emulates.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const SOURCES: [&str; 6] = ["boot.S", "machine.c", "text.c", "options.c", "pattern.c", "main.c"];
const HEADERS: [&str; 5] = ["machine.h", "text.h", "options.h", "pattern.h", "guest.ld"];

const COMPILER_FLAGS: [&str; 16] = [
    "-std=c11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fno-pic",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    // The loops in memcpy and memset must not become calls of themselves.
    "-fno-tree-loop-distribute-patterns",
    // Interrupts save neither the red zone nor vector registers.
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-nostdlib",
    "-static",
    "-no-pie",
];

const LINKER_FLAGS: [&str; 4] = [
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=0x1000",
    "-Wl,-z,noexecstack",
    "-Wl,--no-warn-rwx-segments",
];

fn main() -> Result<()> {
    let sources = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("guest");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for name in SOURCES.iter().chain(&HEADERS) {
        println!("cargo::rerun-if-changed={}", sources.join(name).display());
    }
    let linked = out.join("proof-guest.64.elf");
    run(Command::new("gcc")
        .args(COMPILER_FLAGS)
        .args(LINKER_FLAGS)
        .arg("-T")
        .arg(sources.join("guest.ld"))
        .arg("-o")
        .arg(&linked)
        .args(SOURCES.map(|name| sources.join(name))))?;
    let reader = sources.join("reader.S");
    println!("cargo::rerun-if-changed={}", reader.display());
    let flags = ["-nostdlib", "-static", "-no-pie", "-m32", "-Wl,--oformat=binary", "-Wl,--build-id=none"];
    run(Command::new("gcc")
        .args(flags)
        .arg("-Wl,-Ttext=0x7c00")
        .arg("-o")
        .arg(out.join("reader.img"))
        .arg(reader))?;
    wrap(&linked, &out.join("proof-guest.elf"))
}

/// QEMU's multiboot loader takes 32-bit ELF files only.
fn wrap(linked: &Path, wrapped: &Path) -> Result<()> {
    run(Command::new("objcopy").args(["-O", "elf32-i386"]).arg(linked).arg(wrapped))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let status = command.status().with_context(|| {
        format!("cannot run {}: install gcc and binutils (scripts/setup build)", program.display())
    })?;
    ensure!(status.success(), "{} ended with {status}", program.display());
    Ok(())
}
