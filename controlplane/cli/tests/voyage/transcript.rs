//! What an SRE would see of a drill: each command, and what it really printed. docs/operations.md has these.

use ramferry_proto::v1;

use crate::harness::{Agent, ramferry, seconds};

/// Runs `ramferry`, and shows what it prints; `hidden` options stand for the caller's environment.
pub(crate) fn show(arguments: &[&str], hidden: &[String]) -> String {
    let output = ramferry().args(arguments).args(hidden).output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("$ ramferry {}\n{said}(exit status {:?})\n", arguments.join(" "), output.status.code());
    said
}

/// What doctor says of some checks of a running agent.
pub(crate) fn show_doctor(agent: &Agent, checks: &[&str], hidden: &[String]) -> String {
    let asked = agent.grpc.to_string();
    let output = ramferry().args(["doctor", "--agent", &asked]).args(hidden).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut told = String::new();
    let mut is_asked = false;
    for line in text.lines() {
        if !line.trim_start().starts_with("->") {
            is_asked = checks.iter().any(|check| line.split_whitespace().nth(1) == Some(check));
        }
        if is_asked {
            told += &format!("{line}\n");
        }
    }
    println!("$ ramferry doctor --agent {asked} | grep -A 1 -E '{}'\n{told}", checks.join("|"));
    told
}

/// The figures of a migration that ended.
pub(crate) fn show_figures(what: &str, migration: &v1::Migration) {
    let progress = migration.progress.as_ref().unwrap();
    println!(
        "== {what}: {:?} over {:?}, {:.1} MB in {:.2} s of copy ({:.1} MB/s), {:.2} s in all, downtime {:.0} ms, {} rounds, \
         registered {:.1} MB, at most {:.1} MB at once\n",
        migration.state(),
        migration.fabric(),
        progress.transferred_bytes as f64 / 1e6,
        progress.transferred_bytes as f64 * 8.0 / progress.throughput_bits_per_second.max(1) as f64,
        progress.throughput_bits_per_second as f64 / 8e6,
        seconds(progress.total_time),
        seconds(progress.downtime) * 1e3,
        progress.rounds.len(),
        progress.registered_bytes as f64 / 1e6,
        progress.pinned_peak_bytes as f64 / 1e6,
    );
}
