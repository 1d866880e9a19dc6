//! A migration's log. With the first bit of the first byte set, the rest is taken for bodies, each behind its length
//! in one byte, and put into whole frames: no fuzzer finds a CRC-32.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ramferry_agent::fuzzing::{journal, shown};
use ramferry_agent::journal::Record;

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else { return };
    let bytes = if mode & 1 == 0 { rest.to_vec() } else { framed(rest, mode & 2 != 0) };
    let Ok((created, records, end)) = journal::read(&bytes) else { return };
    assert!(end <= bytes.len());
    let _ = shown(&created, &records);

    // Once the torn tail is cut off, the log is whole, and takes another record.
    let mut log = bytes[..end].to_vec();
    let (created_again, records_again, end_again) = journal::read(&log).expect("a log that was cut is whole");
    assert_eq!((&created_again, &records_again, end_again), (&created, &records, end));
    log.extend(journal::encode(&Record::HandedOver).expect("a short record"));
    let (_, longer, whole) = journal::read(&log).expect("a log with one more record");
    assert_eq!((longer.len(), whole), (records.len() + 1, log.len()));
    assert_eq!(longer.last(), Some(&Record::HandedOver));

    // The record that was being written when the host died is whole, or not there.
    let cut = end + (log.len() - end) * usize::from(*mode) / 256;
    let (_, after_crash, _) = journal::read(&log[..cut]).expect("a torn tail is no damage");
    assert_eq!(after_crash, records);
});

/// `torn`: the last frame lacks its last byte.
fn framed(mut rest: &[u8], torn: bool) -> Vec<u8> {
    let mut log = Vec::new();
    while let Some((length, tail)) = rest.split_first() {
        // Longer bodies than 255 bytes come up, too: Created is one.
        let (body, tail) = tail.split_at((usize::from(*length) * 4).min(tail.len()));
        log.extend(journal::frame(body).unwrap_or_default());
        rest = tail;
    }
    if torn {
        log.pop();
    }
    log
}
