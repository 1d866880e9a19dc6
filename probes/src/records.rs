//! What the programs keep, byte for byte as in `bpf/measure.h` and `bpf/kernel.bpf.c`.
#![allow(unsafe_code, reason = "aya copies these from the kernel as they are")]

use crate::SLOTS;

/// `enum loss`.
pub(crate) const LOSSES: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SeriesKey {
    pub(crate) tgid: u32,
    pub(crate) operation: u16,
    pub(crate) size_class: u16,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct HistogramRecord {
    pub(crate) sum_ns: u64,
    pub(crate) max_ns: u64,
    pub(crate) bytes: u64,
    pub(crate) slots: [u64; SLOTS],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FailureKey {
    pub(crate) tgid: u32,
    pub(crate) operation: u16,
    pub(crate) number: u16,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct NameRecord {
    pub(crate) text: [u8; 16],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct PressureRecord {
    pub(crate) minor_faults: u64,
    pub(crate) major_faults: u64,
    pub(crate) compactions: u64,
    pub(crate) compaction_ns: u64,
}

const _: () = assert!(size_of::<SeriesKey>() == 8 && size_of::<FailureKey>() == 8);
const _: () = assert!(size_of::<HistogramRecord>() == 24 + 8 * SLOTS);
const _: () = assert!(size_of::<NameRecord>() == 16 && size_of::<PressureRecord>() == 32);

// SAFETY: integers only, without padding (asserted above by size), so that any bytes are a value of it.
unsafe impl aya::Pod for SeriesKey {}
// SAFETY: as SeriesKey.
unsafe impl aya::Pod for HistogramRecord {}
// SAFETY: as SeriesKey.
unsafe impl aya::Pod for FailureKey {}
// SAFETY: as SeriesKey.
unsafe impl aya::Pod for NameRecord {}
// SAFETY: as SeriesKey.
unsafe impl aya::Pod for PressureRecord {}
