//! A process whose RAM arrives page by page: what it reaches for waits, and is never what was there before.

mod crash;
mod guest;
mod refusals;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ramferry_ram::{BlockIndex, BlockRange, Layout, Memory, Owed, PageSets};
use ramferry_tracking::features::postcopy_lacks;
use ramferry_tracking::postcopy::{FaultKind, LetIn, PageFault, RemoteFaults};
use ramferry_tracking::{TrackerKind, arm};
use rustix::fs::MemfdFlags;

use crate::destination::{self, Destination, MIGRATION, arrived, arrived_bytes, next_fault, run};
use crate::file::{PAGE, RamFile, members, sets};
use crate::helper::Helper;
use crate::huge::{HUGE, Pool, huge_file};
use crate::kinds::works;

const RAM: BlockIndex = BlockIndex(0);

/// Whether the kernel has what post-copy needs; where it has not, says so.
fn kernel_has_it() -> bool {
    let why = match postcopy_lacks() {
        Ok(lacking) if lacking.is_empty() => return true,
        Ok(lacking) => lacking.join(", "),
        Err(error) => error.to_string(),
    };
    assert!(!ramferry_lab::inside::is_here(), "the kernel lacks {why}");
    eprintln!("SKIPPED: the kernel lacks {why}");
    false
}

/// A VMM with a RAM file that it has mapped and written to, all of it.
struct Scene {
    file: RamFile,
    vmm: Helper,
    layout: Layout,
    memory: Arc<Memory>,
    directory: tempfile::TempDir,
    _pool: Option<Pool>,
}

impl Scene {
    fn new(file: RamFile) -> Self {
        let mut vmm = Helper::spawn();
        vmm.map("a", &file, 0, file.pages);
        let layout = destination::layout(&[(file.pages, file.page_bytes)]);
        let memory = destination::memory(&layout, &[Path::new(&file.path())]);
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { file, vmm, layout, memory, directory, _pool: None }
    }

    fn arm(&self) -> RemoteFaults {
        RemoteFaults::arm(self.vmm.pid(), Arc::clone(&self.memory), &[]).unwrap()
    }

    fn owed_path(&self) -> PathBuf {
        self.directory.path().join("owed")
    }

    /// Every page is owed.
    fn owe_all(&self) -> Owed {
        let mut pages = PageSets::new(&self.layout);
        pages.block_mut(RAM).insert_run(run(0, self.file.pages));
        Owed::create(&self.owed_path(), MIGRATION, &self.layout, &pages).unwrap()
    }

    /// A page's bytes come.
    fn arrive(&self, page: u64) {
        let length = self.file.page_bytes;
        let mut bytes = vec![0; length as usize];
        arrived_bytes(page, &mut bytes);
        let range = BlockRange { block: RAM, offset: page * length, length };
        self.memory.span(range).unwrap().write_from(&bytes);
    }

    /// The VMM can be tracked, as one can whose memory nobody serves.
    fn is_as_before(&mut self) {
        assert_eq!(self.vmm.status("TracerPid"), "0");
        assert_eq!(userfaultfds_of(self.vmm.pid()), 0);
        self.vmm.write("a", &[0, self.file.pages - 1], 5);
        if !works(TrackerKind::UffdWp) {
            return;
        }
        let mut tracker = arm(Some(TrackerKind::UffdWp), self.vmm.pid(), &[self.file.tracked()]).unwrap();
        self.vmm.write("a", &[1], 6);
        let mut written = sets(&[&self.file]);
        tracker.harvest(&mut written).unwrap();
        assert_eq!(members(&written, 0), [1]);
    }
}

fn userfaultfds_of(pid: u32) -> usize {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let targets = descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.filter(|target| target.to_string_lossy().contains("userfaultfd")).count()
}

/// One scene for each kind of file that the machine has, of so many pages or huge pages.
fn scenes(pages: u64, huge_pages: u64) -> Vec<Scene> {
    let memfd = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap().into();
    let mut scenes = vec![Scene::new(RamFile::new(pages)), Scene::new(RamFile::of(memfd, pages, PAGE))];
    match Pool::grow(huge_pages) {
        Ok(pool) => {
            let scene = Scene::new(huge_file(huge_pages));
            scenes.push(Scene { _pool: Some(pool), ..scene });
        }
        Err(reason) => eprintln!("SKIPPED: {reason}"),
    }
    scenes
}

fn read(page: u64) -> String {
    format!("read a {page}")
}

fn whole(page: u64) -> String {
    format!("{0} {0}", arrived(page))
}

#[test]
fn an_access_waits_until_it_is_let_in_and_finds_what_came() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        let faults = scene.arm();
        scene.vmm.send(&read(3));
        let fault = PageFault { block: RAM, page: 3, kind: FaultKind::Minor, write: false };
        assert_eq!(next_fault(&faults), fault);
        scene.arrive(3);
        let let_in = LetIn { mapped_pages: 1, ..LetIn::default() };
        assert_eq!(faults.let_in(RAM, run(3, 1)).unwrap(), let_in);
        assert_eq!(scene.vmm.answer(), whole(3));

        scene.vmm.send("write a 5 1 77");
        let fault = PageFault { block: RAM, page: 5, kind: FaultKind::Minor, write: true };
        assert_eq!(next_fault(&faults), fault);
        scene.arrive(5);
        faults.let_in(RAM, run(5, 1)).unwrap();
        assert_eq!(scene.vmm.answer(), "ok");
        assert_eq!(scene.vmm.order(&read(5)), format!("77 {}", arrived(5)));

        scene.vmm.send("kernel_read a 6");
        assert_eq!(next_fault(&faults).page, 6);
        scene.arrive(6);
        faults.let_in(RAM, run(6, 1)).unwrap();
        assert_eq!(scene.vmm.answer(), arrived(6).to_string());

        // Those that were let in are passed over, and nobody waits for them any more.
        let let_in = LetIn { mapped_pages: 5, present_pages: 3, ..LetIn::default() };
        (0..8).filter(|page| ![3, 5, 6].contains(page)).for_each(|page| scene.arrive(page));
        assert_eq!(faults.let_in(RAM, run(0, 8)).unwrap(), let_in);
        assert_eq!(scene.vmm.order(&read(7)), whole(7));
        let mut told = Vec::new();
        assert_eq!(faults.wait(Duration::ZERO, &mut told).unwrap(), 0);
        faults.recheck().unwrap();
        faults.end().unwrap();
        scene.is_as_before();
    }
}

#[test]
fn a_hole_is_told_of_and_filled_with_zeros_or_left() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        let page = scene.file.page_bytes;
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(scene.memory.file(RAM), flags, 2 * page, 4 * page).unwrap();
        let faults = scene.arm();
        scene.vmm.send(&read(3));
        let fault = PageFault { block: RAM, page: 3, kind: FaultKind::Missing, write: false };
        assert_eq!(next_fault(&faults), fault);
        let left = LetIn { mapped_pages: 4, hole_pages: 4, ..LetIn::default() };
        assert_eq!(faults.let_in_present(RAM, run(0, 8)).unwrap(), left);
        let filled = LetIn { mapped_pages: 2, populated_pages: 2, present_pages: 1, ..LetIn::default() };
        assert_eq!(faults.let_in(RAM, run(1, 3)).unwrap(), filled);
        assert_eq!(scene.vmm.answer(), "0 0");
        assert!(!scene.memory.presence().unwrap().block(RAM).contains(4));
        // One that came meanwhile is a hole no more.
        scene.vmm.send(&read(4));
        assert_eq!(next_fault(&faults).kind, FaultKind::Missing);
        scene.arrive(4);
        let came = LetIn { mapped_pages: 1, ..LetIn::default() };
        assert_eq!(faults.let_in(RAM, run(4, 1)).unwrap(), came);
        assert_eq!(scene.vmm.answer(), whole(4));
        faults.end().unwrap();
    }
}

#[test]
fn every_mapping_of_a_page_waits_and_is_let_in() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        scene.vmm.map("high", &scene.file, 4, 4);
        scene.vmm.map_as("ro", "seen", &scene.file, 0, 6);
        scene.vmm.order("split a 2 3");
        let faults = scene.arm();
        // One that splits its mapping later is served all the same.
        scene.vmm.order("split a 6 1");
        (0..8).for_each(|page| scene.arrive(page));
        scene.vmm.send("read seen 5");
        assert_eq!(next_fault(&faults).page, 5);
        let let_in = LetIn { mapped_pages: 8 + 4 + 6, ..LetIn::default() };
        assert_eq!(faults.let_in(RAM, run(0, 8)).unwrap(), let_in);
        assert_eq!(scene.vmm.answer(), whole(5));
        for (name, page, expected) in [("high", 1, 5), ("seen", 0, 0), ("a", 3, 3), ("a", 6, 6)] {
            assert_eq!(scene.vmm.order(&format!("read {name} {page}")), whole(expected));
        }
        faults.recheck().unwrap();
        faults.end().unwrap();
        scene.is_as_before();
    }
}

#[test]
fn several_blocks_are_told_apart() {
    if !kernel_has_it() {
        return;
    }
    let pool = match Pool::grow(4) {
        Ok(pool) => pool,
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            return;
        }
    };
    let (small, huge) = (RamFile::new(16), huge_file(4));
    let mut vmm = Helper::spawn();
    vmm.map("huge", &huge, 0, 4);
    vmm.map("small", &small, 0, 16);
    let layout = destination::layout(&[(16, PAGE), (4, HUGE)]);
    let memory = destination::memory(&layout, &[Path::new(&small.path()), Path::new(&huge.path())]);
    let faults = RemoteFaults::arm(vmm.pid(), memory, &[]).unwrap();
    for (name, block, page) in [("small", 0, 9), ("huge", 1, 3)] {
        vmm.send(&format!("read {name} {page}"));
        let fault = next_fault(&faults);
        assert_eq!((fault.block, fault.page), (BlockIndex(block), page));
        assert_eq!(faults.let_in(fault.block, run(page, 1)).unwrap().mapped_pages, 1);
        assert_eq!(vmm.answer(), "1 0");
    }
    faults.end().unwrap();
    drop(pool);
}

#[test]
fn threads_that_race_for_pages_never_see_what_was_there_before() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(4096, 64) {
        let owed = scene.owe_all();
        let faults = scene.arm();
        let source = |_, page, bytes: &mut [u8]| arrived_bytes(page, bytes);
        scene.vmm.order("exercise a 4 1");
        Destination::new(&scene.memory, &owed, &faults, &source)
            .serve(3, || std::thread::sleep(Duration::from_millis(50)));
        let exercised = scene.vmm.order("exercised");
        assert!(exercised.starts_with("ok "), "{exercised}");
        faults.end().unwrap();
        let page_bytes = scene.file.page_bytes;
        for page in 0..scene.file.pages {
            let stamp = scene.file.stamp(page);
            assert_eq!(stamp[..8], arrived(page).to_ne_bytes(), "page {page} of {page_bytes} bytes");
        }
        scene.is_as_before();
    }
}

#[test]
fn what_is_not_owed_is_let_in_as_it_is() {
    if !kernel_has_it() {
        return;
    }
    for mut scene in scenes(64, 8) {
        (0..8).for_each(|page| scene.arrive(page));
        let mut pages = PageSets::new(&scene.layout);
        pages.block_mut(RAM).insert_run(run(4, scene.file.pages - 4));
        let owed = Owed::create(&scene.owed_path(), MIGRATION, &scene.layout, &pages).unwrap();
        scene.vmm.write("a", &[2], 9);
        let faults = scene.arm();
        scene.vmm.send(&read(2));
        let source = |_, page, bytes: &mut [u8]| arrived_bytes(page, bytes);
        Destination::new(&scene.memory, &owed, &faults, &source).serve(1, || {
            assert_eq!(scene.vmm.answer(), format!("9 {}", arrived(2)));
        });
        assert_eq!(scene.vmm.order(&read(7)), whole(7));
        faults.end().unwrap();
    }
}
