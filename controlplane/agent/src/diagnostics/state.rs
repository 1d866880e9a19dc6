//! The agent's state directory and the migrations in its journal.

use std::os::linux::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Access, AtFlags, CWD};

use super::host::Host;
use super::verdict::{Verdict, bytes};
use crate::MigrationRole;
use crate::journal::{self, Surveyed};

/// One log's most.
const FAIL_BYTES: u64 = 8 << 20;
const WARN_BYTES: u64 = 100 << 20;
/// A migration that was handed over and has not ended for so long waits for a peer that does not answer.
const HANDED_OVER_PATIENCE: Duration = Duration::from_secs(600);
/// Most migrations that are named.
const NAMED: usize = 5;

/// The directory that holds the journal.
#[derive(Clone, Debug)]
pub(super) struct StateDir {
    pub(super) path: PathBuf,
    /// The directory, or where it is not there the nearest above that is.
    pub(super) existing: PathBuf,
    /// Why nothing can be written there.
    pub(super) refusal: Option<String>,
    pub(super) free_bytes: Option<u64>,
    /// Mode and owner, where others than the agent could change what is there.
    pub(super) exposed: Option<(u32, u32)>,
}

impl StateDir {
    pub(super) fn read(path: &Path) -> Self {
        let existing = path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/")).to_owned();
        let may = Access::WRITE_OK | Access::EXEC_OK;
        let refusal = rustix::fs::accessat(CWD, &existing, may, AtFlags::EACCESS).err();
        let exposed = (existing == path).then(|| journal::exposure(path)).flatten();
        let space = rustix::fs::statvfs(&existing).ok();
        Self {
            path: path.to_owned(),
            refusal: refusal.map(|errno| errno.to_string()),
            free_bytes: space.map(|space| space.f_bavail.saturating_mul(space.f_frsize)),
            exposed,
            existing,
        }
    }

    pub(super) fn judge(&self) -> Verdict {
        let path = self.path.display();
        if let Some(why) = &self.refusal {
            return Verdict::fail(
                format!(
                    "{}: {why} (as user {})",
                    self.existing.display(),
                    rustix::process::geteuid().as_raw()
                ),
                format!(
                    "run doctor as the agent's user; if this is that user: mkdir -p {path} && chown it to the agent's \
                     user, or set state_dir to a directory that it may write"
                ),
            );
        }
        if let Some((mode, owner)) = self.exposed {
            return Verdict::fail(
                format!(
                    "{path} has mode {mode:04o} and owner {owner}: others could change which host runs a guest"
                ),
                format!("chmod go-w {path}, and chown it to the agent's user"),
            );
        }
        let there = if self.existing == self.path { "writable" } else { "not there yet; the agent makes it" };
        let Some(free) = self.free_bytes else {
            return Verdict::warn(
                format!("{path}: {there}; its free space is not known"),
                format!("df {path}"),
            );
        };
        let evidence = format!("{path}: {there}; {} free", bytes(free));
        let remedy =
            format!("free space on the file system of {path} (df {path}), or set state_dir to another");
        if free < FAIL_BYTES {
            return Verdict::fail(format!("{evidence}, less than one migration's log may take"), remedy);
        }
        if free < WARN_BYTES {
            return Verdict::warn(evidence, remedy);
        }
        Verdict::ok(evidence)
    }
}

/// What the journal holds.
#[derive(Clone, Debug)]
pub(super) struct JournalState {
    pub(super) directory: PathBuf,
    pub(super) logs: Result<Vec<Surveyed>, String>,
    /// Whether an agent has it locked.
    pub(super) is_held: bool,
    pub(super) now: SystemTime,
}

impl JournalState {
    pub(super) fn read(host: &Host, state_dir: &Path, now: SystemTime) -> Self {
        let directory = state_dir.join("journal");
        Self {
            logs: journal::survey(&directory).map_err(|error| crate::status::causes(&error)),
            is_held: is_locked(host, &directory.join("lock")),
            directory,
            now,
        }
    }

    pub(super) fn judge(&self) -> Verdict {
        let directory = self.directory.display();
        let logs = match &self.logs {
            Ok(logs) => logs,
            Err(why) => {
                return Verdict::fail(
                    format!("{directory}: {why}"),
                    "run doctor as the agent's user; a disk that fails is replaced before any migration",
                );
            }
        };
        if let Some(damaged) = logs.iter().find_map(|log| log.damage.as_ref()) {
            return Verdict::fail(
                damaged,
                "find out on which host that guest runs and let it run there only; then move the file away and start the \
                 agent",
            );
        }
        let unfinished: Vec<&Surveyed> = logs.iter().filter(|log| !log.has_ended).collect();
        let evidence = format!(
            "{} migrations in {directory}, {} not ended; {}",
            logs.len(),
            unfinished.len(),
            if self.is_held { "an agent holds it" } else { "no agent is seen to hold it" }
        );
        if unfinished.is_empty() {
            return Verdict::ok(evidence);
        }
        let handed_over: Vec<&Surveyed> = unfinished
            .iter()
            .copied()
            .filter(|log| log.role == MigrationRole::Source && log.is_handed_over)
            .collect();
        if !self.is_held {
            let remedy = "start the agent: it takes them up where they were";
            if handed_over.is_empty() {
                return Verdict::warn(format!("{evidence}: {}", names(&unfinished)), remedy);
            }
            return Verdict::fail(
                format!(
                    "{evidence}; handed over: {}: their guests stand still here until it is settled",
                    names(&handed_over)
                ),
                remedy,
            );
        }
        let is_late = |log: &&&Surveyed| {
            let created = UNIX_EPOCH + Duration::from_millis(log.created_unix_ms);
            self.now.duration_since(created).is_ok_and(|age| age > HANDED_OVER_PATIENCE)
        };
        let late: Vec<&Surveyed> = handed_over.iter().filter(is_late).copied().collect();
        if late.is_empty() {
            return Verdict::ok(format!("{evidence}: {}", names(&unfinished)));
        }
        Verdict::warn(
            format!(
                "{evidence}; handed over, and the peer does not say what became of them: {}",
                names(&late)
            ),
            "start the agent at the destination, or mend the network to it (--peer); never resume the guest here by hand",
        )
    }
}

fn names(logs: &[&Surveyed]) -> String {
    let mut told: Vec<String> =
        logs.iter().take(NAMED).map(|log| format!("{} ({})", log.id, log.role.as_str())).collect();
    if logs.len() > NAMED {
        told.push(format!("{} more", logs.len() - NAMED));
    }
    told.join(", ")
}

/// Whether somebody holds an exclusive lock on a file, without trying to take it: an agent that starts at that
/// moment would be refused.
fn is_locked(host: &Host, lock: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(lock) else { return false };
    let inode = format!(":{}", metadata.st_ino());
    let held = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.contains(&"FLOCK")
            && words.contains(&"WRITE")
            && words.iter().any(|word| word.ends_with(&inode))
    };
    host.text("/proc/locks").is_some_and(|locks| locks.lines().any(held))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::verdict::Status;
    use super::*;
    use crate::journal::Journal;

    fn state_dir(free_bytes: u64) -> StateDir {
        StateDir {
            path: "/var/lib/ramferry".into(),
            existing: "/var/lib/ramferry".into(),
            refusal: None,
            free_bytes: Some(free_bytes),
            exposed: None,
        }
    }

    #[test]
    fn a_state_directory_needs_space_rights_and_privacy() {
        assert_eq!(state_dir(1 << 30).judge().status, Status::Ok);
        assert_eq!(state_dir(50 << 20).judge().status, Status::Warn);
        assert_eq!(state_dir(1 << 20).judge().status, Status::Fail);
        let refused = StateDir { refusal: Some("Permission denied".into()), ..state_dir(1 << 30) }.judge();
        assert!(refused.status == Status::Fail && refused.remedy.contains("state_dir"), "{refused:?}");
        let exposed = StateDir { exposed: Some((0o777, 5)), ..state_dir(1 << 30) }.judge();
        assert!(exposed.status == Status::Fail && exposed.evidence.contains("0777"), "{exposed:?}");
    }

    #[test]
    fn a_directory_that_is_not_there_is_judged_by_the_one_above() {
        let directory = tempfile::tempdir().unwrap();
        let read = StateDir::read(&directory.path().join("a/b"));
        assert_eq!(read.existing, directory.path());
        assert!(read.judge().evidence.contains("the agent makes it"), "{read:?}");
        let exposed = directory.path().join("exposed");
        std::fs::create_dir(&exposed).unwrap();
        std::fs::set_permissions(&exposed, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(StateDir::read(&exposed).judge().status, Status::Fail);
    }

    fn log(role: MigrationRole, has_ended: bool, is_handed_over: bool) -> Surveyed {
        Surveyed { id: "vm-1".into(), role, created_unix_ms: 0, has_ended, is_handed_over, damage: None }
    }

    fn journal(logs: Vec<Surveyed>, is_held: bool) -> JournalState {
        JournalState {
            directory: "/j".into(),
            logs: Ok(logs),
            is_held,
            now: UNIX_EPOCH + HANDED_OVER_PATIENCE * 2,
        }
    }

    #[test]
    fn migrations_that_have_not_ended_are_told_by_whether_an_agent_sees_to_them() {
        let source = MigrationRole::Source;
        let judged = |log, is_held| journal(vec![log], is_held).judge().status;
        assert_eq!(judged(log(source, true, true), false), Status::Ok);
        assert_eq!(judged(log(source, false, false), true), Status::Ok);
        assert_eq!(judged(log(source, false, false), false), Status::Warn);
        assert_eq!(judged(log(source, false, true), false), Status::Fail);
        assert_eq!(judged(log(source, false, true), true), Status::Warn);
        let soon = JournalState { now: UNIX_EPOCH, ..journal(vec![log(source, false, true)], true) };
        assert_eq!(soon.judge().status, Status::Ok);
        let many = journal(vec![log(source, false, false); 7], false).judge();
        assert!(many.evidence.ends_with("vm-1 (source), 2 more"), "{many:?}");
    }

    #[test]
    fn a_damaged_or_unreadable_journal_fails() {
        let damaged =
            Surveyed { damage: Some("x is damaged".into()), ..log(MigrationRole::Source, true, false) };
        assert_eq!(journal(vec![damaged], true).judge().status, Status::Fail);
        let unreadable = JournalState { logs: Err("denied".into()), ..journal(vec![], false) };
        assert_eq!(unreadable.judge().status, Status::Fail);
    }

    #[test]
    fn an_agent_is_seen_by_its_lock() {
        let state = tempfile::tempdir().unwrap();
        std::fs::set_permissions(state.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let read = || JournalState::read(&Host::here(), state.path(), SystemTime::now());
        assert_eq!(read().judge().status, Status::Ok, "a journal that was never made is empty");
        let held = Journal::open(&state.path().join("journal")).unwrap();
        assert!(read().is_held);
        drop(held);
        assert!(!read().is_held);
    }
}
