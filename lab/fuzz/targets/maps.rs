//! `/proc/PID/maps` of a VMM, whose paths its owner chooses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ramferry_tracking::maps;

fuzz_target!(|text: &[u8]| {
    match maps::parse_text(text) {
        Ok(vmas) => {
            for vma in vmas {
                assert!(vma.length_bytes() > 0 && vma.offset.checked_add(vma.length_bytes()).is_some());
            }
        }
        Err(line) => assert!(!line.is_empty()),
    }
});
