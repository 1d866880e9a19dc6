use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::Duration;

use ramferry_proto::v1;

use super::*;

const SYNCED: Durability = Durability::Synced;

fn created(role: MigrationRole, id: &str) -> Created {
    Created {
        id: id.into(),
        request_id: "request-1".into(),
        role,
        spec: SpecRecord { source_qmp_path: "/run/vm.sock".into(), ..SpecRecord::default() },
        guest_pid: 42,
        created_unix_ms: 1_700_000_000_000,
        guest_was_running: true,
        session: None,
    }
}

fn begin(journal: &Journal, id: &str) -> MigrationLog {
    journal.create(MigrationRole::Source, id, &created(MigrationRole::Source, id)).unwrap()
}

fn file_of(dir: &Path, id: &str) -> PathBuf {
    dir.join(format!("{id}.source.journal"))
}

fn aborted(message: &str) -> Record {
    Record::Aborted { reason: "LINK_LOST".into(), message: message.into() }
}

#[test]
fn restart_finds_every_record_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let written = [
        Record::SwitchingOver,
        Record::HandedOver,
        Record::Ended {
            state: "SUCCEEDED".into(),
            reason: String::new(),
            message: String::new(),
            summary: serde_json::json!({"downtime_seconds": 0.012, "rounds": [1, 2]}),
        },
    ];
    {
        let (journal, recovered) = Journal::open(dir.path()).unwrap();
        assert!(recovered.is_empty());
        let mut log = begin(&journal, "vm-1");
        for record in &written {
            log.append(record, SYNCED).unwrap();
        }
        begin(&journal, "vm-2");
    }
    let (_journal, mut recovered) = Journal::open(dir.path()).unwrap();
    recovered.sort_by_key(|found| found.created.id.clone());
    assert_eq!(recovered[0].created, created(MigrationRole::Source, "vm-1"));
    assert_eq!(recovered[0].records, written);
    assert_eq!(recovered[0].ended(), written.last());
    assert_eq!(recovered[1].ended(), None);
}

#[test]
fn recovered_log_goes_on_where_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    begin(&Journal::open(dir.path()).unwrap().0, "m").append(&Record::HandedOver, SYNCED).unwrap();
    {
        let (_journal, mut recovered) = Journal::open(dir.path()).unwrap();
        recovered[0].log.append(&aborted("peer said so"), Durability::Buffered).unwrap();
    }
    let (_journal, recovered) = Journal::open(dir.path()).unwrap();
    assert_eq!(recovered[0].records, [Record::HandedOver, aborted("peer said so")]);
}

#[test]
fn log_cut_at_any_byte_reads_as_its_whole_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = file_of(dir.path(), "m");
    let created_bytes = {
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let mut log = begin(&journal, "m");
        let created_bytes = fs::metadata(&path).unwrap().len();
        log.append(&Record::SwitchingOver, SYNCED).unwrap();
        log.append(&Record::HandedOver, SYNCED).unwrap();
        created_bytes
    };
    let whole = fs::read(&path).unwrap();
    for cut in usize::try_from(created_bytes).unwrap()..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let (_journal, mut recovered) = Journal::open(dir.path()).unwrap();
        assert!(!recovered[0].records.contains(&Record::HandedOver));
        recovered[0].log.append(&aborted("torn"), SYNCED).unwrap();
        drop(_journal);
        let (_journal, recovered) = Journal::open(dir.path()).unwrap();
        assert_eq!(recovered[0].records.last(), Some(&aborted("torn")), "cut at {cut}");
    }
}

#[test]
fn syncing_ahead_changes_nothing_and_may_come_too_late() {
    let dir = tempfile::tempdir().unwrap();
    {
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let mut log = begin(&journal, "m");
        log.append(&Record::SwitchingOver, Durability::Buffered).unwrap();
        let ahead = std::thread::spawn(log.sync_ahead());
        log.append(&Record::HandedOver, SYNCED).unwrap();
        ahead.join().unwrap();
        let removed = begin(&journal, "removed").sync_ahead();
        journal.remove(MigrationRole::Source, "removed").unwrap();
        removed();
    }
    let (_journal, recovered) = Journal::open(dir.path()).unwrap();
    assert_eq!(recovered[0].records, [Record::SwitchingOver, Record::HandedOver]);
}

#[test]
fn damage_before_a_whole_record_refuses_and_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = file_of(dir.path(), "m");
    {
        let (journal, _) = Journal::open(dir.path()).unwrap();
        begin(&journal, "m").append(&Record::HandedOver, SYNCED).unwrap();
    }
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"\xff", 20).unwrap();
    let error = Journal::open(dir.path()).unwrap_err();
    assert!(matches!(error, JournalError::Corrupt { offset: 0, .. }), "{error}");
    assert!(error.to_string().contains("m.source.journal"));
}

#[test]
fn log_without_a_whole_first_record_refuses() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(file_of(dir.path(), "m"), b"").unwrap();
    assert!(matches!(Journal::open(dir.path()), Err(JournalError::Corrupt { .. })));
}

#[test]
fn log_under_another_migrations_name_refuses() {
    let dir = tempfile::tempdir().unwrap();
    begin(&Journal::open(dir.path()).unwrap().0, "m");
    fs::rename(file_of(dir.path(), "m"), file_of(dir.path(), "n")).unwrap();
    assert!(matches!(Journal::open(dir.path()), Err(JournalError::Corrupt { .. })));
}

#[test]
fn record_of_a_newer_agent_refuses() {
    let dir = tempfile::tempdir().unwrap();
    begin(&Journal::open(dir.path()).unwrap().0, "m");
    let path = file_of(dir.path(), "m");
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend(frame::encode(br#"{"record":"teleported"}"#).unwrap());
    fs::write(&path, bytes).unwrap();
    assert!(matches!(Journal::open(dir.path()), Err(JournalError::Unknown { .. })));
}

#[test]
fn creation_that_was_not_finished_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let unfinished = dir.path().join("m.source.journal.unfinished");
    fs::write(&unfinished, b"half").unwrap();
    let (journal, recovered) = Journal::open(dir.path()).unwrap();
    assert!(recovered.is_empty() && !unfinished.exists());
    begin(&journal, "m");
    assert!(!unfinished.exists());
}

#[test]
fn second_agent_is_refused_until_the_first_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = Journal::open(dir.path()).unwrap();
    assert!(matches!(Journal::open(dir.path()), Err(JournalError::Locked { .. })));
    drop(first);
    assert!(Journal::open(dir.path()).is_ok());
}

#[test]
fn child_of_an_agent_that_ended_does_not_keep_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = Journal::open(dir.path()).unwrap();
    let shared = first._lock.file().try_clone().unwrap();
    drop(first);
    assert!(Journal::open(dir.path()).is_ok());
    drop(shared);
}

#[test]
fn one_id_has_a_log_for_each_role_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    begin(&journal, "m");
    let destination = MigrationRole::Destination;
    journal.create(destination, "m", &created(destination, "m")).unwrap();
    let again = journal.create(destination, "m", &created(destination, "m"));
    assert!(matches!(again, Err(JournalError::Exists { .. })));

    journal.remove(destination, "m").unwrap();
    journal.remove(destination, "m").unwrap();
    journal.create(destination, "m", &created(destination, "m")).unwrap();
}

#[test]
fn ids_cannot_leave_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    for id in ["", "a/b", "..\0", "ä", &"x".repeat(65)] {
        let result = journal.create(MigrationRole::Source, id, &created(MigrationRole::Source, id));
        assert!(matches!(result, Err(JournalError::Id { .. })), "{id:?}");
    }
    for id in ["..", ".", "a.source", "A-Z_09"] {
        begin(&journal, id);
        assert!(file_of(dir.path(), id).exists());
    }
    drop(journal);
    assert_eq!(Journal::open(dir.path()).unwrap().1.len(), 4);
}

#[test]
fn oversized_record_is_refused_and_the_log_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    {
        let (journal, _) = Journal::open(dir.path()).unwrap();
        let mut log = begin(&journal, "m");
        let result = log.append(&aborted(&"x".repeat(frame::BODY_LIMIT_BYTES)), SYNCED);
        assert!(matches!(result, Err(JournalError::TooLarge { .. })));
        log.append(&Record::HandedOver, SYNCED).unwrap();
    }
    assert_eq!(Journal::open(dir.path()).unwrap().1[0].records, [Record::HandedOver]);
}

/// Appends until the disk is full; then every record but the last is found.
fn fill_then_recover(directory: &Path, make_room: impl FnOnce()) {
    let mut taken = Vec::new();
    {
        let (journal, _) = Journal::open(directory).unwrap();
        let mut log = begin(&journal, "m");
        let error = loop {
            let record = aborted(&format!("{:->1000}", taken.len()));
            match log.append(&record, Durability::Buffered) {
                Ok(()) => taken.push(record),
                Err(error) => break error,
            }
            assert!(taken.len() < 10_000, "the disk is never full");
        };
        assert!(matches!(error, JournalError::Append { .. }), "{error}");
        make_room();
        log.append(&Record::HandedOver, SYNCED).unwrap();
        taken.push(Record::HandedOver);
    }
    assert_eq!(Journal::open(directory).unwrap().1[0].records, taken);
}

#[test]
fn full_disk_takes_no_half_record_and_a_retry_succeeds() {
    struct Mounted(tempfile::TempDir);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0.path()).status();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs"])
        .arg(dir.path())
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: this user may not mount a small tmpfs");
        return;
    }
    let mounted = Mounted(dir);
    let ballast = mounted.0.path().join("ballast");
    fs::write(&ballast, [0; 32 * 1024]).unwrap();
    fill_then_recover(mounted.0.path(), || fs::remove_file(&ballast).unwrap());
}

/// Re-runs this test in a process with a file size limit, where SIGXFSZ is ignored.
#[test]
fn file_size_limit_takes_no_half_record() {
    const CHILD: &str = "RAMFERRY_TEST_FILE_SIZE_LIMITED";
    if std::env::var_os(CHILD).is_some() {
        let dir = tempfile::tempdir().unwrap();
        let lift = || {
            rustix::process::setrlimit(
                rustix::process::Resource::Fsize,
                rustix::process::Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) },
            )
            .unwrap();
        };
        let limit = rustix::process::Rlimit { current: Some(50_000), maximum: Some(1 << 20) };
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
        fill_then_recover(dir.path(), lift);
        return;
    }
    let test = std::thread::current().name().expect("tests are named").to_owned();
    let output = Command::new("sh")
        .args(["-c", "trap '' XFSZ; exec \"$0\" --exact \"$1\" --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn log_that_cannot_be_cut_back_takes_no_more() {
    let full = fs::OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let mut log = MigrationLog::over(Path::new("/dev/full"), full);
    let first = log.append(&Record::HandedOver, SYNCED).unwrap_err();
    assert!(matches!(first, JournalError::Uncertain { .. }), "{first}");
    assert_eq!(first.reason(), "JOURNAL_UNCERTAIN");
    assert!(matches!(log.append(&Record::HandedOver, SYNCED), Err(JournalError::Poisoned { .. })));
}

#[test]
fn failed_fsync_leaves_the_log_uncertain() {
    // Takes every write and refuses an fsync.
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let mut log = MigrationLog::over(Path::new("/dev/null"), null);
    let result = log.append(&Record::HandedOver, SYNCED);
    assert!(matches!(result, Err(JournalError::Uncertain { .. })), "{result:?}");
    assert!(matches!(
        log.append(&Record::SwitchingOver, Durability::Buffered),
        Err(JournalError::Poisoned { .. })
    ));
}

#[test]
fn spec_survives_the_journal() {
    let spec = v1::MigrationSpec {
        source_qmp_path: "/a".into(),
        destination_qmp_path: "/b".into(),
        destination_agent: "host:7050".into(),
        parameters: Some(v1::MigrationParameters {
            max_downtime: Some(prost_types::Duration { seconds: 0, nanos: 15_000_000 }),
            bandwidth_limit_bits_per_second: 10_000_000_000,
            timeout: None,
            timeout_action: v1::TimeoutAction::Force.into(),
            no_progress_timeout: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
            registration_mode: v1::RegistrationMode::PinAll.into(),
            pin_budget_bytes: 1 << 30,
            fabric: v1::FabricKind::Tcp.into(),
            streams: 4,
            verify: true,
            postcopy: 2,
            throttle_max_percent: 80,
        }),
    };
    let record = SpecRecord::try_from(&spec).unwrap();
    assert_eq!(record.parameters.as_ref().unwrap().max_downtime, Some(Duration::from_millis(15)));
    let json = serde_json::to_vec(&record).unwrap();
    let read: SpecRecord = serde_json::from_slice(&json).unwrap();
    assert_eq!(v1::MigrationSpec::from(&read), spec);

    let negative = v1::MigrationParameters {
        timeout: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
        ..v1::MigrationParameters::default()
    };
    assert_eq!(ParametersRecord::try_from(&negative).unwrap_err().field, "timeout");
}

#[test]
fn directory_that_others_may_change_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let (state, journal) = (dir.path().join("state"), dir.path().join("state/journal"));
    drop(Journal::open(&journal).unwrap());
    let allow = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    for (path, mode) in [(&journal, 0o770), (&state, 0o777), (&journal, 0o702)] {
        allow(path, mode);
        let error = Journal::open(&journal).unwrap_err();
        assert!(matches!(error, JournalError::Exposed { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("{mode:04o}")) && text.contains("chmod go-w"), "{text}");
        allow(path, 0o755);
    }
    Journal::open(&journal).unwrap();
}

#[test]
fn logs_of_what_has_ended_hold_no_files() {
    let open_files =
        || fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
    let dir = tempfile::tempdir().unwrap();
    let ended = Record::Ended {
        state: "FAILED".into(),
        reason: String::new(),
        message: String::new(),
        summary: serde_json::Value::Null,
    };
    {
        let (journal, _) = Journal::open(dir.path()).unwrap();
        begin(&journal, "over").append(&ended, SYNCED).unwrap();
        begin(&journal, "on");
    }
    let (_journal, mut recovered) = Journal::open(dir.path()).unwrap();
    let is_open = |id| open_files().any(|path| path == file_of(dir.path(), id));
    assert!(!is_open("over") && is_open("on"));
    let over = recovered.iter_mut().find(|found| found.created.id == "over").unwrap();
    assert!(matches!(over.log.append(&ended, SYNCED), Err(JournalError::Poisoned { .. })));
}

#[test]
fn a_survey_tells_of_every_migration_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(dir.path()).unwrap();
    begin(&journal, "handed-over").append(&Record::HandedOver, SYNCED).unwrap();
    begin(&journal, "under-way");
    begin(&journal, "damaged");
    let torn = file_of(dir.path(), "under-way");
    let mut bytes = std::fs::read(&torn).unwrap();
    bytes.extend([7, 0, 0, 0, 1]);
    std::fs::write(&torn, &bytes).unwrap();
    std::fs::write(file_of(dir.path(), "damaged"), "no frame").unwrap();
    // While the agent holds it.
    let found = survey(dir.path()).unwrap();
    let mut told: Vec<_> =
        found.iter().map(|log| (log.id.as_str(), log.is_handed_over, log.damage.is_some())).collect();
    told.sort_unstable();
    let damaged = "damaged.source.journal";
    assert_eq!(told, [(damaged, false, true), ("handed-over", true, false), ("under-way", false, false)]);
    assert_eq!(std::fs::read(&torn).unwrap(), bytes);
    assert_eq!(survey(&dir.path().join("never-made")).unwrap(), []);
}
