//! The command line: what may be given, and what `--help` teaches.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use self::agent::AgentArgs;
use self::bench::BenchArgs;
use self::connection::OutputFormat;
use self::doctor::DoctorArgs;
use self::migration::{CheckArgs, DeleteArgs, IdArgs, ListArgs, MigrateArgs, SetArgs, WatchArgs};
use self::probe::ProbeArgs;

pub(crate) mod agent;
pub(crate) mod bench;
pub(crate) mod connection;
pub(crate) mod doctor;
pub(crate) mod migration;
pub(crate) mod names;
pub(crate) mod probe;
pub(crate) mod units;

/// What the exit codes mean, below every command's help.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0    done; of migrate and watch: the migration SUCCEEDED
  1    the migration FAILED, or the command could not do its work
  2    the command line, or a file that it names, is not usable
  3    the migration was CANCELLED; the guest runs at the source
  4    the agent cannot be reached, or stayed away while it was watched
  5    the agent refused; reason and remedy are on stderr
  6    of doctor: a check failed
  130  left by Ctrl-C; the migration goes on";

const EXAMPLES: &str = "\
Examples:
  ramferry agent                                   serve this host
  ramferry check   --to 10.0.0.2:7050 --source-qmp /run/vm1.qmp --destination-qmp /run/vm1.qmp
  ramferry migrate --to 10.0.0.2:7050 --source-qmp /run/vm1.qmp --destination-qmp /run/vm1.qmp
  ramferry list";

/// Live-migrates the RAM of a running virtual machine over RDMA, shared memory or TCP, from outside its VMM.
#[derive(Debug, Parser)]
#[command(
    name = "ramferry",
    version,
    arg_required_else_help = true,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}")
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve this host: an agent runs on the source and on the destination of every migration.
    Agent(Box<AgentArgs>),
    /// Migrate a guest, and follow the migration to its end.
    Migrate(Box<MigrateArgs>),
    /// Make every check of a migration, on both hosts, and change nothing.
    Check(Box<CheckArgs>),
    /// List the migrations that an agent knows.
    List(ListArgs),
    /// Show one migration.
    Get(IdArgs),
    /// Follow a migration to its end.
    Watch(WatchArgs),
    /// End a migration before its commit; the guest runs on at the source.
    Cancel(IdArgs),
    /// Change parameters of a running migration: those that are given.
    Set(SetArgs),
    /// Switch over after the round that is under way, whatever the downtime will be.
    Switchover(IdArgs),
    /// Make an agent forget a migration that has ended.
    Delete(DeleteArgs),
    /// Check whether this host is fit to migrate guests, and say what to do where it is not.
    Doctor(DoctorArgs),
    /// Measure what migrations are made of on this host, or between two, beside what it can do.
    Bench(BenchArgs),
    /// Watch what registering memory costs on this host, in any process.
    Probe(ProbeArgs),
    /// Free a throttled guest once the agent that made this process has ended.
    #[command(hide = true, name = ramferry_agent::throttle::GUARD_COMMAND)]
    ThrottleGuard {
        /// What the agent kept of it.
        record: PathBuf,
    },
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  ramferry completions bash > /etc/bash_completion.d/ramferry")]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page, or write those of all commands into a directory.
    #[command(after_help = "Example:\n  ramferry man --out-dir /usr/local/share/man/man1")]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Directory for the pages of all commands.
    #[arg(long, value_name = "DIR")]
    pub(crate) out_dir: Option<PathBuf>,
}

impl Command {
    /// How the caller wants to be answered, and so how errors are told.
    pub(crate) fn output(&self) -> Option<OutputFormat> {
        let connection = match self {
            Self::Migrate(args) => &args.connection,
            Self::Check(args) => &args.connection,
            Self::List(args) => &args.connection,
            Self::Get(args) | Self::Cancel(args) | Self::Switchover(args) => &args.connection,
            Self::Watch(args) => &args.connection,
            Self::Set(args) => &args.connection,
            Self::Delete(args) => &args.connection,
            Self::Bench(args) => return args.output(),
            Self::Probe(args) => return Some(args.output),
            Self::Doctor(args) => return Some(args.output),
            Self::Agent(_) | Self::ThrottleGuard { .. } | Self::Completions { .. } | Self::Man(_) => {
                return None;
            }
        };
        Some(connection.output)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn migrate_takes_what_its_help_promises() {
        let command = parse(
            "ramferry migrate --agent a:1 --to b:2 --source-qmp /s --destination-qmp /d --id vm-1 --fabric shm \
             --registration pin-all --max-downtime 15ms --bandwidth-limit 10Gbit --pin-budget 4GiB --streams 4 \
             --timeout 5m --on-timeout force --no-progress-timeout 3s --throttle=80 --verify --output json --quiet --detach",
        );
        assert!(matches!(command, Ok(Command::Migrate(args)) if args.spec.parameters.verify && args.detach));
    }

    #[test]
    fn migrate_needs_both_guests_and_a_destination() {
        let error = parse("ramferry migrate --source-qmp /s").expect_err("incomplete").to_string();
        assert!(error.contains("--to") && error.contains("--destination-qmp"), "{error}");
    }

    #[test]
    fn set_needs_something_to_set() {
        assert!(parse("ramferry set vm-1").is_err());
        assert!(parse("ramferry set vm-1 --timeout none").is_ok());
    }

    #[test]
    fn throttle_is_a_share_or_as_far_as_it_goes() {
        let asked = |option: &str| {
            let line = format!("ramferry migrate --to b:2 --source-qmp /s --destination-qmp /d {option}");
            match parse(&line) {
                Ok(Command::Migrate(args)) => {
                    args.spec.into_proto().parameters.map(|given| given.throttle_max_percent)
                }
                _ => None,
            }
        };
        assert_eq!((asked(""), asked("--throttle"), asked("--throttle=80%")), (Some(0), Some(99), Some(80)));
        assert_eq!(
            (asked("--throttle=none"), asked("--throttle=0"), asked("--throttle=100")),
            (Some(0), None, None)
        );
        assert!(
            parse("ramferry set vm-1 --throttle 50").is_ok()
                && parse("ramferry set vm-1 --throttle").is_err()
        );
    }

    #[test]
    fn key_without_certificate_is_refused() {
        let error = parse("ramferry list --tls-key k").expect_err("half of an identity").to_string();
        assert!(error.contains("--tls-cert") && error.contains("--tls-ca"), "{error}");
    }

    #[test]
    fn doctor_takes_what_its_help_promises() {
        for line in [
            "ramferry doctor",
            "ramferry doctor --config /etc/ramferry.toml --output json",
            "ramferry doctor --agent 127.0.0.1:7050 --peer node-2:7050 --tls-ca a --tls-cert b --tls-key c",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        let error = parse("ramferry doctor --peer 10.0.0.2").expect_err("half an address").to_string();
        assert!(error.contains("no port"), "{error}");
    }

    #[test]
    fn bench_takes_what_its_help_promises() {
        for line in [
            "ramferry bench fabric",
            "ramferry bench fabric --fabric shm --sizes 4KiB,16MiB --links 1,2,64 --runs 5 --duration 1s \
             --memory 1GiB --timeout 10m --output json --quiet",
            "ramferry bench fabric --listen 10.0.0.2:7060 --memory 1GiB --timeout 10m",
            "ramferry bench fabric --connect node-2:7060 --fabric tcp",
            "ramferry bench registration --fabric shm --sizes 4KiB,1GiB --threads 1,2 --runs 1 --memory 2GiB",
            "ramferry bench scan --memory 2GiB --runs 5 --output json",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn bench_refuses_what_it_cannot_measure() {
        for (line, expected) in [
            ("ramferry bench fabric --sizes 32MiB", "at most 16 MiB"),
            ("ramferry bench fabric --sizes 0KiB", "zero bytes"),
            ("ramferry bench fabric --links 65", "1..=64"),
            ("ramferry bench fabric --runs 0", "1..=100"),
            ("ramferry bench fabric --duration 2m", "at most 60s"),
            ("ramferry bench fabric --listen 10.0.0.2:7060 --connect a:1", "cannot be used with"),
            ("ramferry bench fabric --listen 10.0.0.2:7060 --sizes 4KiB", "cannot be used with"),
            ("ramferry bench fabric --listen node-2:7060", "invalid socket address"),
            ("ramferry bench fabric --connect 10.0.0.2", "no port"),
            ("ramferry bench registration --sizes 5000B", "whole pages"),
            ("ramferry bench scan --fabric tcp", "unexpected argument"),
            ("ramferry bench", "Usage"),
        ] {
            let error = parse(line).expect_err(line).to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn probe_takes_what_its_help_promises() {
        let command = parse(
            "ramferry probe --pid 4711 --comm qemu-system-x86_64 --duration 30s --interval 500ms --library /a --library /b \
             --output json",
        );
        let Ok(Command::Probe(args)) = command else { panic!("{command:?}") };
        assert_eq!((args.comm.as_deref(), args.library.len()), (Some("qemu-system-x86"), 2));
        assert!(parse("ramferry probe --pid 0").is_err() && parse("ramferry probe --interval 0s").is_err());
    }

    #[test]
    fn quantity_errors_teach() {
        let error = parse("ramferry set vm-1 --bandwidth-limit 10gbit").expect_err("wrong case").to_string();
        assert!(error.contains("`Gbit`?"), "{error}");
    }
}
