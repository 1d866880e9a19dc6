use super::*;

const OF_7_2: &str = "\
              Block Name    PSize              Offset               Used              Total
                      m0    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
                            4 KiB  0x0000000018000000 0x0000000004000000 0x0000000004000000
    /rom@etc/acpi/tables    4 KiB  0x0000000011100000 0x0000000000020000 0x0000000000200000
0000:00:02.0/virtio-net-pci.rom    4 KiB  0x00000000110c0000 0x0000000000040000 0x0000000000040000
";

const OF_10_0: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
              /objects/m    2 MiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f11d7e00000  rw
                 pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000 0x00007f11e7c00000  ro
";

fn vma(start: u64, end: u64, offset: u64) -> Vma {
    Vma {
        start,
        end,
        offset,
        writable: true,
        executable: false,
        shared: true,
        identity: Some(FileIdentity { device: 1, inode: 2 }),
        path: PathBuf::from("/dev/shm/qemu_back_mem.a.XyZ123"),
        deleted: true,
    }
}

#[test]
fn ram_blocks_of_7_2_are_read() {
    let blocks = parse(OF_7_2).unwrap();
    assert_eq!(blocks.len(), 4);
    let named = |name: &str| blocks.iter().find(|block| block.name == name).unwrap();
    assert_eq!(
        named("m0").block(),
        Block { name: "m0".into(), guest_address: 0, length_bytes: 256 << 20, page_bytes: 4096 }
    );
    assert_eq!(named("").guest_address, 0x1800_0000);
    assert_eq!(named("/rom@etc/acpi/tables").used_bytes, 0x20000);
    assert_eq!(named("0000:00:02.0/virtio-net-pci.rom").length_bytes, 0x40000);
}

#[test]
fn columns_are_found_by_their_headings() {
    let blocks = parse(OF_10_0).unwrap();
    assert_eq!((blocks[0].name.as_str(), blocks[0].page_bytes), ("/objects/m", 2 << 20));
    assert_eq!(blocks[1].guest_address, 0x1000_0000);
    let swapped = parse("Block Name PSize Total Offset Used\n a 4 KiB 0x3000 0x1000 0x2000\n").unwrap();
    let RamBlock { guest_address, used_bytes, length_bytes, .. } = swapped[0];
    assert_eq!((guest_address, used_bytes, length_bytes), (0x1000, 0x2000, 0x3000));
}

#[test]
fn a_listing_that_is_not_understood_is_refused() {
    let header = "Block Name PSize Offset Used Total\n";
    for row in
        ["", " a 4 KiB 0x1 0x2", " a 4 XiB 0x1 0x2 0x3", " a KiB 0x1 0x2 0x3", " a 4 KiB 0xz 0x2 0x3", "0x1"]
    {
        let text = format!("{header}{row}\n");
        assert_eq!(parse(&text).is_ok(), row.is_empty(), "{row:?}");
    }
    assert!(parse("").is_err());
    assert!(parse("Block Name PSize Offset Used\n").is_err());
}

#[test]
fn blocks_are_the_same_in_any_order_and_with_any_use() {
    let before = parse(OF_7_2).unwrap();
    let mut now = before.clone();
    now.reverse();
    now[0].used_bytes = 4096;
    assert!(same(&before, &now));
    assert!(!same(&before, &now[1..]));
    now[1].length_bytes = 4096;
    assert!(!same(&before, &now));
}

#[test]
fn a_mapping_in_pieces_is_whole_without_a_gap_only() {
    let pieces = [vma(0x9000, 0xa000, 0x2000), vma(0x1000, 0x3000, 0)];
    assert_eq!(whole(&pieces, 0x3000).unwrap().offset, 0);
    assert!(whole(&pieces, 0x4000).is_none());
    assert!(whole(&pieces[..1], 0x1000).is_none());
    assert!(whole(&[vma(0x1000, 0x3000, 0), vma(0x9000, 0xa000, 0x3000)], 0x4000).is_none());
}

#[test]
fn a_temporary_file_is_known_by_the_whole_of_its_name() {
    let wanted = |name: &str| Wanted::Temporary { device: 1, beginning: format!("qemu_back_mem.{name}.") };
    let identity = FileIdentity { device: 1, inode: 2 };
    assert!(wanted("a").is(identity, &vma(0, 1, 0)));
    assert!(!wanted("b").is(identity, &vma(0, 1, 0)));
    assert!(!wanted("a").is(FileIdentity { device: 9, inode: 2 }, &vma(0, 1, 0)));
    let longer = Vma { path: PathBuf::from("/dev/shm/qemu_back_mem.a.b.XyZ123"), ..vma(0, 1, 0) };
    assert!(!wanted("a").is(identity, &longer));
    assert!(wanted("a.b").is(identity, &longer));
}

#[test]
fn only_shared_files_are_left_out_of_the_stream() {
    let block = &parse(OF_7_2).unwrap()[0];
    let version = |major, minor| Version { major, minor, micro: 0 };
    let check = |version, kind, share| {
        check_kind(version, block, kind, share).map_err(|error| error.reason()).err().unwrap_or("ok")
    };
    assert_eq!(check(version(10, 0), "memory-backend-file", true), "ok");
    assert_eq!(check(version(8, 0), "memory-backend-memfd", true), "ok");
    assert_eq!(check(version(8, 1), "memory-backend-memfd", true), "SHARED_MEMORY_NOT_SKIPPED");
    assert_eq!(check(version(10, 0), "memory-backend-shm", true), "SHARED_MEMORY_NOT_SKIPPED");
    for (kind, share) in
        [("memory-backend-file", false), ("memory-backend-memfd", false), ("memory-backend-ram", true)]
    {
        assert_eq!(check(version(7, 2), kind, share), "PRIVATE_MEMORY");
    }
}
