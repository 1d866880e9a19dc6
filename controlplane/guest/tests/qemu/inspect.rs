use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use ramferry_guest::{GuestError, Side};
use ramferry_ram::Access;
use serde_json::json;
use tempfile::TempDir;

use crate::harness::{FarEnd, RAM_BYTES, Stream, Vm, qemus, skipped};

/// Inspects a guest that must be refused, and returns the reason.
async fn refusal(binary: &Path, side: Side, arguments: &str) -> GuestError {
    let vm = Vm::start(binary, arguments).await;
    let error = vm.inspect(side).await.map(|(_, info, _)| info).unwrap_err();
    assert!(!error.remedy().is_empty());
    error
}

#[tokio::test]
async fn inspection_tells_what_a_guest_is_and_changes_nothing() {
    for binary in qemus() {
        let disk = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = disk.path().join("disk");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let vm = Vm::guest(
            &binary,
            &format!(
                "-smp 2 -name tea -blockdev file,node-name=fast,cache.direct=on,filename={} \
                 -blockdev file,node-name=slow,read-only=on,filename={}",
                image.display(),
                image.display()
            ),
        )
        .await;
        let before = vm.settings().await;
        let (qemu, info, files) = vm.inspect(Side::Source).await.unwrap();
        assert_eq!((qemu.pid(), info.pid), (vm.pid(), vm.pid()));
        assert!(info.vmm.starts_with("QEMU ") && info.machine.starts_with("pc-q35-"), "{info:?}");
        assert_eq!((info.vcpus, info.running, info.name.as_deref()), (2, true, Some("tea")));
        assert_eq!(info.direct_io_disks, ["fast"]);
        let blocks = info.layout.blocks();
        assert_eq!((blocks.len(), blocks[0].name.as_str()), (1, "ram0"));
        assert_eq!((blocks[0].guest_address, blocks[0].length_bytes), (0, RAM_BYTES));
        // Video memory and firmware.
        assert!((16 << 20..32 << 20).contains(&info.private_bytes), "{}", info.private_bytes);
        let ram = std::fs::metadata(vm.path("ram")).unwrap();
        assert_eq!((files[0].identity().device, files[0].identity().inode), (ram.dev(), ram.ino()));
        assert_eq!((files[0].access(), files[0].length_bytes()), (Access::Read, RAM_BYTES));
        assert_eq!(vm.settings().await, before);
    }
}

#[tokio::test]
async fn several_backends_are_several_blocks_in_order_of_address() {
    for binary in qemus() {
        for machine in ["q35", "pc"] {
            let arguments = format!(
                "-machine {machine} -m 64M,slots=2,maxmem=1G -smp 2 \
                 -object memory-backend-file,id=unused,size=16M,mem-path=@,share=on \
                 -object memory-backend-file,id=b,size=32M,mem-path=@/b,share=on \
                 -object memory-backend-file,id=a,size=32M,mem-path=@,share=on \
                 -numa node,memdev=a,cpus=0 -numa node,memdev=b,cpus=1 \
                 -object memory-backend-file,id=a.b,size=128M,mem-path=@,share=on \
                 -device pc-dimm,memdev=a.b"
            );
            let vm = Vm::start(&binary, &arguments).await;
            let (_, info, files) = vm.inspect(Side::Source).await.unwrap();
            let blocks = info.layout.blocks();
            let mut names: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
            assert!(blocks.is_sorted_by_key(|block| block.guest_address));
            names.sort_unstable();
            assert_eq!(names, ["a", "a.b", "b"]);
            for (block, file) in blocks.iter().zip(&files) {
                assert_eq!(file.length_bytes(), block.length_bytes, "{}", block.name);
            }
            let named = std::fs::metadata(vm.path("b")).unwrap().ino();
            let at = blocks.iter().position(|block| block.name == "b").unwrap();
            assert_eq!(files[at].identity().inode, named);
        }
    }
}

#[tokio::test]
async fn a_ram_file_that_was_unlinked_or_replaced_is_found_by_its_mapping() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let inode = std::fs::metadata(vm.path("ram")).unwrap().ino();
        std::fs::remove_file(vm.path("ram")).unwrap();
        let (_, _, files) = vm.inspect(Side::Source).await.unwrap();
        assert_eq!(files[0].identity().inode, inode);
        std::fs::File::create(vm.path("ram")).unwrap().set_len(RAM_BYTES).unwrap();
        let error = vm.inspect(Side::Source).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "BLOCK_NOT_MAPPED");
    }
}

#[tokio::test]
async fn huge_pages_are_the_pages_of_their_block() {
    let Some(huge) = HugePages::mount(RAM_BYTES) else { return };
    for binary in qemus() {
        let arguments = format!(
            "-machine q35,memory-backend=ram0 -m 64M -object memory-backend-file,id=ram0,size=64M,mem-path={},share=on",
            huge.directory.path().display()
        );
        let vm = Vm::start(&binary, &arguments).await;
        let (_, info, files) = vm.inspect(Side::Source).await.unwrap();
        assert_eq!((info.layout.blocks()[0].page_bytes, files[0].page_bytes()), (2 << 20, 2 << 20));
    }
}

/// A hugetlbfs of the test's own. Unmounted when dropped.
struct HugePages {
    directory: TempDir,
}

impl HugePages {
    fn mount(needed_bytes: u64) -> Option<Self> {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        let free =
            meminfo.lines().find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse::<u64>().ok());
        if free.unwrap_or(0) * (2 << 20) < needed_bytes {
            skipped("not enough free huge pages (vm.nr_hugepages)");
            return None;
        }
        let directory = TempDir::with_prefix("ramferry-huge-").unwrap();
        let mount = Command::new("mount").args(["-t", "hugetlbfs", "none"]).arg(directory.path()).status();
        if !mount.is_ok_and(|status| status.success()) {
            skipped("may not mount hugetlbfs");
            return None;
        }
        Some(Self { directory })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.directory.path()).status();
    }
}

#[tokio::test]
async fn memory_that_cannot_be_moved_is_refused_with_the_option_to_use() {
    for binary in qemus() {
        let file = "memory-backend-file,id=ram0,size=64M,mem-path=@/ram";
        for (backend, machine) in [
            (String::new(), "q35"),
            ("-object memory-backend-ram,id=ram0,size=64M".to_owned(), "q35,memory-backend=ram0"),
            (format!("-object {file}"), "q35,memory-backend=ram0"),
            (format!("-object {file},share=off"), "pc,memory-backend=ram0"),
        ] {
            let error = refusal(&binary, Side::Source, &format!("-m 64M -machine {machine} {backend}")).await;
            assert_eq!(error.reason(), "PRIVATE_MEMORY", "{backend}: {error}");
            assert!(
                error
                    .remedy()
                    .contains("memory-backend-file,id=ram0,size=64M,mem-path=/dev/shm/NAME,share=on")
            );
        }
    }
}

#[tokio::test]
async fn a_memfd_is_refused_from_8_1_on() {
    for binary in qemus() {
        let vm = Vm::start(
            &binary,
            "-m 64M -machine q35,memory-backend=ram0 -object memory-backend-memfd,id=ram0,size=64M,share=on",
        )
        .await;
        match vm.inspect(Side::Source).await {
            Ok((qemu, info, files)) => {
                assert!((qemu.version().major, qemu.version().minor) < (8, 1), "{}", qemu.version());
                assert_eq!((info.layout.total_bytes(), files[0].length_bytes()), (RAM_BYTES, RAM_BYTES));
            }
            Err(error) => assert_eq!(error.reason(), "SHARED_MEMORY_NOT_SKIPPED"),
        }
    }
}

#[tokio::test]
async fn ram_files_that_are_not_one_whole_tmpfs_file_each_are_refused() {
    let disk = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for binary in qemus() {
        let backend = |path: &str| {
            format!(
                "-m 64M -machine q35,memory-backend=ram0 -object memory-backend-file,id=ram0,size=64M,mem-path={path},share=on"
            )
        };
        let on_disk = backend(disk.path().join("ram").to_str().unwrap());
        assert_eq!(refusal(&binary, Side::Source, &on_disk).await.reason(), "RAM_FILE_SYSTEM");

        let longer = TempDir::with_prefix_in("ramferry-guest-", "/dev/shm").unwrap();
        let path = longer.path().join("ram");
        std::fs::File::create(&path).unwrap().set_len(RAM_BYTES * 2).unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(refusal(&binary, Side::Source, &backend(path)).await.reason(), "RAM_FILE_LENGTH");

        let twice = "-machine q35 -m 64M -smp 2 \
                     -object memory-backend-file,id=a,size=32M,mem-path=@/ram,share=on \
                     -object memory-backend-file,id=b,size=32M,mem-path=@/ram,share=on \
                     -numa node,memdev=a,cpus=0 -numa node,memdev=b,cpus=1";
        assert_eq!(refusal(&binary, Side::Source, twice).await.reason(), "RAM_FILE_SHARED");
    }
}

#[tokio::test]
async fn devices_that_cannot_be_followed_are_refused_by_name() {
    for binary in qemus() {
        let ram = "-machine q35,memory-backend=ram0 -m 64M,maxmem=1G \
                   -object memory-backend-file,id=ram0,size=64M,mem-path=@/ram,share=on";
        let of = |devices: &str| format!("{ram} {devices}");
        let error = refusal(
            &binary,
            Side::Source,
            &of("-object memory-backend-file,id=more,size=128M,mem-path=@/more,share=on -device virtio-mem-pci,id=vm0,memdev=more"),
        )
        .await;
        assert_eq!(error.reason(), "VIRTIO_MEM");
        assert!(error.to_string().contains("/machine/peripheral/vm0"), "{error}");

        let error =
            refusal(&binary, Side::Source, &of("-device virtio-balloon-pci,free-page-reporting=on")).await;
        assert_eq!(error.reason(), "FREE_PAGE_REPORTING");

        let vm = Vm::guest(&binary, "-device virtio-balloon-pci").await;
        vm.inspect(Side::Source).await.unwrap();

        let error = refusal(
            &binary,
            Side::Source,
            &of("-object memory-backend-file,id=peer,size=1M,mem-path=@/peer,share=on -device ivshmem-plain,memdev=peer"),
        )
        .await;
        assert_eq!(error.reason(), "MIGRATION_BLOCKED");
        assert!(error.to_string().contains("ivshmem"), "{error}");
    }
}

#[tokio::test]
async fn a_guest_in_the_wrong_state_is_refused() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "-S").await;
        let (_, info, _) = vm.inspect(Side::Source).await.unwrap();
        assert!(!info.running);
        let error = vm.inspect(Side::Destination).await.map(|_| ()).unwrap_err();
        assert_eq!((error.reason(), error.remedy().contains("-incoming defer")), ("GUEST_STATE", true));

        let waiting = vm.destination("").await;
        let (_, info, files) = waiting.inspect(Side::Destination).await.unwrap();
        assert_eq!((info.running, files[0].access()), (false, Access::ReadWrite));
        let error = waiting.inspect(Side::Source).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "GUEST_STATE");

        let incoming = format!("unix:{}", waiting.path("arriving").display());
        waiting.ask("migrate-incoming", json!({ "uri": incoming })).await;
        let error = waiting.inspect(Side::Destination).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "INCOMING_STARTED");

        let off = Vm::guest(&binary, "-no-shutdown").await;
        off.ask("human-monitor-command", json!({ "command-line": "system_reset" })).await;
        off.ask("stop", json!({})).await;
        off.inspect(Side::Source).await.unwrap();
        let tls = json!({ "tls-creds": "tls0" });
        off.ask("migrate-set-parameters", tls).await;
        let error = off.inspect(Side::Source).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "TLS_CREDENTIALS_SET");
    }
}

#[tokio::test]
async fn a_guest_that_is_being_migrated_is_refused() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Stuck);
        let capabilities = json!([{ "capability": "pause-before-switchover", "state": true }]);
        vm.ask("migrate-set-capabilities", json!({ "capabilities": capabilities })).await;
        vm.ask("migrate", json!({ "uri": format!("unix:{}", path.display()) })).await;
        let error = vm.inspect(Side::Source).await.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "ALREADY_MIGRATING");
    }
}

#[tokio::test]
async fn a_qmp_socket_with_another_client_is_busy() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let (_first, _, _) = vm.inspect(Side::Source).await.unwrap();
        let timeouts = ramferry_guest::Timeouts {
            command: std::time::Duration::from_millis(100),
            ..ramferry_guest::Timeouts::default()
        };
        let second = ramferry_guest::Qemu::inspect(&vm.path("qmp"), Side::Source, timeouts).await;
        let error = second.map(|_| ()).unwrap_err();
        assert_eq!(error.reason(), "QMP_BUSY");
        assert!(error.remedy().contains("one client at a time"));
    }
}
