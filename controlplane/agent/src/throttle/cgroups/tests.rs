use std::cell::RefCell;
use std::collections::BTreeSet;

use super::*;

const V1_MOUNTS: &str = "30 20 0:26 / /cg rw shared:3 - tmpfs tmpfs rw\n\
                         31 30 0:27 /pod /cg/cpu rw shared:4 - cgroup cgroup rw,cpu,cpuacct\n";
const V2_MOUNTS: &str = "24 20 0:21 / /cg rw shared:3 - cgroup2 cgroup2 rw,nsdelegate\n";

/// Cgroups as far as they are used here: a child has its control files, and a thread is in one of them.
#[derive(Default)]
struct Fake {
    files: RefCell<BTreeMap<PathBuf, String>>,
    directories: RefCell<BTreeSet<PathBuf>>,
    refuses: Option<(&'static str, i32)>,
    is_read_only: bool,
}

impl Fake {
    fn new(mounts: &str, files: &[(&str, &str)]) -> Self {
        let fake = Self::default();
        fake.put("/proc/self/mountinfo", mounts);
        fake.put("/sys/devices/system/cpu/online", "0-3\n");
        files.iter().for_each(|(path, text)| fake.put(path, text));
        fake
    }

    fn put(&self, path: &str, text: &str) {
        self.files.borrow_mut().insert(path.into(), text.to_owned());
    }

    fn text(&self, path: &str) -> Option<String> {
        self.files.borrow().get(Path::new(path)).cloned()
    }

    fn changes(&self) -> io::Result<()> {
        if self.is_read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    fn missing() -> io::Error {
        io::ErrorKind::NotFound.into()
    }
}

impl Files for Fake {
    fn read(&self, path: &Path) -> io::Result<String> {
        self.files.borrow().get(path).cloned().ok_or_else(Self::missing)
    }

    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        self.changes()?;
        if let Some((name, errno)) = self.refuses
            && path.ends_with(name)
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let name = path.file_name().unwrap().to_owned();
        let mut files = self.files.borrow_mut();
        if !files.contains_key(path) {
            return Err(Self::missing());
        }
        if name == "tasks" || name == "cgroup.threads" {
            for (_, list) in files.iter_mut().filter(|(path, _)| path.ends_with(&name)) {
                *list = list
                    .split_whitespace()
                    .filter(|thread| *thread != text)
                    .map(|thread| format!("{thread}\n"))
                    .collect();
            }
            files.get_mut(path).unwrap().push_str(&format!("{text}\n"));
        } else if name == "cgroup.subtree_control" {
            *files.get_mut(path).unwrap() = if text == "+cpu" { "cpu".into() } else { String::new() };
        } else {
            files.insert(path.to_owned(), text.to_owned());
        }
        Ok(())
    }

    fn make(&self, directory: &Path) -> io::Result<()> {
        self.changes()?;
        if !self.directories.borrow_mut().insert(directory.to_owned()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for name in
            ["tasks", "cgroup.threads", "cgroup.type", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"]
        {
            self.files.borrow_mut().insert(directory.join(name), String::new());
        }
        Ok(())
    }

    fn remove(&self, directory: &Path) -> io::Result<()> {
        self.changes()?;
        for list in ["tasks", "cgroup.threads"] {
            if self.read(&directory.join(list)).is_ok_and(|threads| !threads.is_empty()) {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
        }
        if !self.directories.borrow_mut().remove(directory) {
            return Err(Self::missing());
        }
        self.files.borrow_mut().retain(|path, _| !path.starts_with(directory));
        Ok(())
    }

    fn names(&self, directory: &Path) -> io::Result<Vec<String>> {
        let directories = self.directories.borrow();
        let children = directories.iter().filter(|path| path.parent() == Some(directory));
        Ok(children.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect())
    }
}

/// Two vCPUs, 8 and 9, of process 7, whose cgroup may have one processor and a half.
fn v1() -> Fake {
    let lines = "4:memory:/elsewhere\n3:cpuacct,cpu:/pod/vm\n0::/unified\n";
    let files = [
        ("/proc/7/task/8/cgroup", lines),
        ("/proc/7/task/9/cgroup", lines),
        ("/cg/cpu/vm/tasks", "7\n8\n9\n"),
        ("/cg/cpu/vm/cpu.cfs_quota_us", "-1\n"),
        ("/cg/cpu/vm/cpu.cfs_period_us", "100000\n"),
        ("/cg/cpu/cpu.cfs_quota_us", "150000\n"),
        ("/cg/cpu/cpu.cfs_period_us", "100000\n"),
    ];
    Fake::new(V1_MOUNTS, &files)
}

fn v2() -> Fake {
    let files = [
        ("/proc/7/task/8/cgroup", "0::/vm\n"),
        ("/proc/7/task/9/cgroup", "0::/vm\n"),
        ("/cg/vm/cgroup.threads", "7\n8\n9\n"),
        ("/cg/vm/cgroup.controllers", "cpu io memory\n"),
        ("/cg/vm/cgroup.subtree_control", ""),
        ("/cg/vm/cpu.max", "max 100000\n"),
    ];
    Fake::new(V2_MOUNTS, &files)
}

#[test]
fn on_v1_vcpus_are_held_back_in_a_child_and_brought_home() {
    let fake = v1();
    let [hold] = &plan(&fake, 7, &[8, 9], "m", &[]).unwrap()[..] else { panic!("one cgroup") };
    hold.begin(&fake, Percent(20)).unwrap();
    let child = |name: &str| fake.text(&format!("/cg/cpu/vm/ramferry-m/{name}"));
    assert_eq!(child("tasks").unwrap(), "8\n9\n");
    assert_eq!(fake.text("/cg/cpu/vm/tasks").unwrap(), "7\n", "the VMM's own thread stays");
    assert_eq!(child("cpu.cfs_quota_us").unwrap(), "12000", "four fifths of one and a half");
    assert_eq!(child("cpu.cfs_period_us").unwrap(), "10000");
    hold.set(&fake, Percent(0)).unwrap();
    assert_eq!(child("cpu.cfs_quota_us").unwrap(), "-1");
    hold.undo(&fake).unwrap();
    assert_eq!(child("tasks"), None);
    assert_eq!(fake.text("/cg/cpu/vm/tasks").unwrap(), "7\n8\n9\n");
    assert_eq!(fake.text("/cg/cpu/vm/cpu.cfs_quota_us").unwrap(), "-1\n");
    hold.undo(&fake).expect("nothing is left to be undone");
}

#[test]
fn on_v2_the_child_is_threaded_and_the_controller_is_taken_from_children_again() {
    let fake = v2();
    let [hold] = &plan(&fake, 7, &[8, 9], "m", &[]).unwrap()[..] else { panic!("one cgroup") };
    hold.begin(&fake, Percent(99)).unwrap();
    let child = |name: &str| fake.text(&format!("/cg/vm/ramferry-m/{name}"));
    assert_eq!(child("cgroup.type").unwrap(), "threaded");
    assert_eq!(child("cgroup.threads").unwrap(), "8\n9\n");
    assert_eq!(child("cpu.max").unwrap(), "1000 50000", "a fiftieth of a processor of two");
    assert_eq!(fake.text("/cg/vm/cgroup.subtree_control").unwrap(), "cpu");

    // Another guest in the same cgroup needs it for longer.
    let others = std::slice::from_ref(hold);
    let [other] = &plan(&fake, 7, &[8], "n", others).unwrap()[..] else { panic!("one cgroup") };
    fake.make(Path::new("/cg/vm/ramferry-n")).unwrap();
    hold.undo(&fake).unwrap();
    assert_eq!(fake.text("/cg/vm/cgroup.threads").unwrap(), "7\n8\n9\n");
    assert_eq!(fake.text("/cg/vm/cgroup.subtree_control").unwrap(), "cpu");
    other.undo(&fake).unwrap();
    assert_eq!(fake.text("/cg/vm/cgroup.subtree_control").unwrap(), "");
}

#[test]
fn on_v2_a_controller_that_children_had_before_is_left_to_them() {
    let fake = v2();
    fake.put("/cg/vm/cgroup.subtree_control", "cpu");
    let [hold] = &plan(&fake, 7, &[8], "m", &[]).unwrap()[..] else { panic!("one cgroup") };
    hold.begin(&fake, Percent(20)).unwrap();
    let others = std::slice::from_ref(hold);
    let [other] = &plan(&fake, 7, &[9], "n", others).unwrap()[..] else { panic!("one cgroup") };
    other.begin(&fake, Percent(20)).unwrap();
    hold.undo(&fake).unwrap();
    other.undo(&fake).unwrap();
    assert_eq!(fake.text("/cg/vm/cgroup.subtree_control").unwrap(), "cpu");

    let mut fake = v2();
    let [hold] = &plan(&fake, 7, &[8], "m", &[]).unwrap()[..] else { panic!("one cgroup") };
    hold.begin(&fake, Percent(20)).unwrap();
    fake.refuses = Some(("cgroup.subtree_control", rustix::io::Errno::BUSY.raw_os_error()));
    hold.undo(&fake).expect("others have it for their children now");
    assert_eq!(fake.text("/cg/vm/ramferry-m/cpu.max"), None);
}

#[test]
fn of_cgroups_that_are_read_only_nothing_has_to_be_undone() {
    for fake in [v1(), v2()] {
        let fake = Fake { is_read_only: true, ..fake };
        let [hold] = &plan(&fake, 7, &[8], "m", &[]).unwrap()[..] else { panic!("one cgroup") };
        let said = crate::status::causes(&hold.begin(&fake, Percent(20)).unwrap_err());
        assert!(said.contains("ProtectControlGroups=no"), "{said}");
        hold.undo(&fake).expect("nothing was made");
    }
}

#[test]
fn of_several_mounts_the_one_that_shows_the_guest_is_taken() {
    let fake = v2();
    fake.put("/proc/self/mountinfo", &format!("23 20 0:21 /pod /pods rw - cgroup2 cgroup2 rw\n{V2_MOUNTS}"));
    let [hold] = &plan(&fake, 7, &[8], "m", &[]).unwrap()[..] else { panic!("one cgroup") };
    assert_eq!(hold.home, Path::new("/cg/vm"));
}

#[test]
fn vcpus_in_cgroups_of_their_own_get_a_child_each() {
    let fake = v2();
    fake.put("/proc/7/task/9/cgroup", "0::/vm/vcpu1\n");
    fake.put("/cg/vm/vcpu1/cgroup.controllers", "cpu\n");
    let holds = plan(&fake, 7, &[8, 9], "m", &[]).unwrap();
    let homes: Vec<_> = holds.iter().map(|hold| (hold.home.as_path(), hold.capacity_millis)).collect();
    assert_eq!(homes, [(Path::new("/cg/vm"), 1000), (Path::new("/cg/vm/vcpu1"), 1000)]);
}

#[test]
fn what_cannot_be_had_is_refused_with_what_to_do() {
    let refused = |fake: &Fake| {
        let error =
            plan(fake, 7, &[8], "m", &[]).and_then(|holds| holds[0].begin(fake, Percent(20))).unwrap_err();
        crate::status::causes(&error)
    };
    let no_cpu = v2();
    no_cpu.put("/cg/vm/cgroup.controllers", "memory\n");
    let elsewhere = v1();
    elsewhere.put("/proc/7/task/8/cgroup", "3:cpu:/other\n");
    let above = v2();
    above.put("/proc/7/task/8/cgroup", "0::/../vm\n");
    let unmounted = Fake::new("", &[("/proc/7/task/8/cgroup", "0::/vm\n")]);
    let busy = Fake { refuses: Some(("cgroup.type", 95)), ..v2() };
    let denied = Fake { refuses: Some(("cpu.cfs_quota_us", 30)), ..v1() };
    let realtime = Fake { refuses: Some(("tasks", 22)), ..v1() };
    for (fake, part) in [
        (&no_cpu, "+cpu"),
        (&elsewhere, "cgroup namespace"),
        (&above, "cgroup namespace"),
        (&unmounted, "mount it"),
        (&busy, "cgroup of its own"),
        (&denied, "has to be root"),
        (&realtime, "real-time policy"),
    ] {
        let said = refused(fake);
        assert!(said.contains(part), "{said} does not say {part}");
    }
}

#[test]
fn quotas_and_periods_are_within_the_kernels_bounds() {
    for capacity_millis in [1, 500, 1000, 1500, 64_000, u64::MAX] {
        for percent in 1..=99 {
            let (quota_us, period_us) = quota(capacity_millis, Percent(percent));
            assert!(quota_us >= LEAST_QUOTA_US && (PERIOD_US..=LONGEST_PERIOD_US).contains(&period_us));
        }
    }
    assert_eq!(quota(1000, Percent(99)), (1_000, 100_000));
    assert_eq!(quota(1000, Percent(20)), (8_000, 10_000));
}

#[test]
fn broken_text_of_the_kernel_is_no_cgroup() {
    for text in ["", "::", "1", "x:y", "1:cpu", "0::"] {
        assert!(home_of(text, "nonsense\n1 2 3 - cgroup\n - - cgroup2").is_err());
    }
}
