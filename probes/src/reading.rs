//! From what the programs keep to what was seen, by process name.
//!
//! The maps have an entry for each process and are bounded: what belonged to a
//! process that has ended is taken out of them and kept here, under its name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use aya::maps::{Array, HashMap, MapData};
use aya::{Ebpf, Pod};

use crate::Histogram;
use crate::records::{FailureKey, HistogramRecord, LOSSES, NameRecord, PressureRecord, SeriesKey};

/// Most names that are told apart.
const NAMES_LIMIT: usize = 64;
/// What the processes of all further names are called.
const OTHER: &str = "other";
/// The inode of the first pid namespace, in every kernel.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Registering, as the caller of libibverbs sees it.
    Register,
    /// Deregistering, likewise.
    Deregister,
    /// Registering in the kernel.
    Kernel,
    /// The pinning of pages, in there.
    Pin,
}

/// Sizes from a power of two to below the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SizeClass(u16);

/// Whose calls count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// This process' only.
    pub pid: Option<u32>,
    /// Processes of this name only.
    pub name: Option<String>,
}

/// All that was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// By process name.
    pub processes: BTreeMap<String, Activity>,
    /// Calls that were seen and could not be counted: a table was full, or a return was never seen.
    pub lost: u64,
}

/// What the processes of one name did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Calls that ended, failed ones too.
    pub calls: BTreeMap<(Operation, SizeClass), Histogram>,
    /// Calls that failed, by errno; 0 where it is not known.
    pub failures: BTreeMap<(Operation, i32), u64>,
    /// What made pinning slow.
    pub pressure: Pressure,
}

/// What made pinning slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Pages that were mapped first.
    pub minor_faults: u64,
    /// Pages that had to be read first.
    pub major_faults: u64,
    /// Times that memory had to be compacted first.
    pub compactions: u64,
    /// For how long.
    pub compaction: Duration,
}

impl Operation {
    /// All of them, by their number in the programs.
    pub const ALL: [Self; 4] = [Self::Register, Self::Deregister, Self::Kernel, Self::Pin];

    /// The name for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Deregister => "deregister",
            Self::Kernel => "kernel",
            Self::Pin => "pin",
        }
    }

    fn of(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

impl SizeClass {
    /// The class of a size.
    pub const fn of(bytes: u64) -> Self {
        Self(if bytes == 0 { 0 } else { bytes.ilog2() as u16 })
    }

    /// Its smallest size; none where the size is not known: a region that was registered before the probes were
    /// attached, or one whose pages are not pinned.
    pub const fn smallest_bytes(self) -> Option<u64> {
        if self.0 < 64 { Some(1 << self.0) } else { None }
    }
}

impl Activity {
    /// All calls of an operation.
    pub fn total(&self, operation: Operation) -> Histogram {
        let mut sum = Histogram::default();
        for histogram in self.calls.iter().filter(|((of, _), _)| *of == operation).map(|(_, calls)| calls) {
            sum.add(histogram);
        }
        sum
    }

    /// Failed calls of an operation.
    pub fn failed(&self, operation: Operation) -> u64 {
        self.failures.iter().filter(|((of, _), _)| *of == operation).map(|(_, count)| count).sum()
    }

    fn add(&mut self, other: &Self) {
        for (key, histogram) in &other.calls {
            self.calls.entry(*key).or_default().add(histogram);
        }
        for (key, count) in &other.failures {
            *self.failures.entry(*key).or_default() += count;
        }
        self.pressure.minor_faults += other.pressure.minor_faults;
        self.pressure.major_faults += other.pressure.major_faults;
        self.pressure.compactions += other.pressure.compactions;
        self.pressure.compaction += other.pressure.compaction;
    }
}

/// Reads the maps again and again.
pub(crate) struct Reader {
    filter: Filter,
    /// Of processes that are running, as they were called when first seen: what was counted under a name stays there.
    names: BTreeMap<u32, String>,
    /// Every name that was ever given.
    given: BTreeSet<String>,
    ended: BTreeMap<String, Activity>,
    /// Whether `/proc` knows processes by the same numbers as the programs.
    is_first_namespace: bool,
}

impl Reader {
    pub(crate) fn new(filter: Filter) -> Self {
        let namespace = std::fs::read_link("/proc/self/ns/pid");
        let is_first_namespace = namespace.is_ok_and(|link| link.as_os_str() == FIRST_PID_NAMESPACE);
        Self {
            filter,
            names: BTreeMap::new(),
            given: BTreeSet::new(),
            ended: BTreeMap::new(),
            is_first_namespace,
        }
    }

    pub(crate) fn read(&mut self, objects: [Option<&mut Ebpf>; 2]) -> Snapshot {
        let mut objects: Vec<_> = objects.into_iter().flatten().collect();
        // Who has ended is asked before what it did is read, which is complete then.
        let tgids: BTreeSet<u32> = objects.iter().flat_map(|object| tgids_in(object)).collect();
        let ended = tgids.into_iter().filter(|&tgid| self.has_ended(tgid)).collect();
        let mut tables = Tables::default();
        for object in &mut objects {
            tables.collect(object, &ended);
        }
        let mut snapshot = Snapshot { processes: BTreeMap::new(), lost: tables.lost };
        for (tgid, activity) in tables.ended {
            let name = self.name_of(tgid, tables.threads.get(&tgid));
            self.names.remove(&tgid);
            if self.counts(tgid, &name) {
                self.ended.entry(name).or_default().add(&activity);
            }
        }
        for (tgid, activity) in tables.running {
            let name = self.name_of(tgid, tables.threads.get(&tgid));
            if self.counts(tgid, &name) {
                snapshot.processes.entry(name).or_default().add(&activity);
            }
        }
        for (name, activity) in &self.ended {
            snapshot.processes.entry(name.clone()).or_default().add(activity);
        }
        snapshot
    }

    fn counts(&self, tgid: u32, name: &str) -> bool {
        self.filter.pid.is_none_or(|pid| pid == tgid)
            && self.filter.name.as_ref().is_none_or(|wanted| wanted == name)
    }

    /// Elsewhere `/proc` says nothing of it: nothing is then ever taken out.
    fn has_ended(&self, tgid: u32) -> bool {
        self.is_first_namespace && !Path::new(&format!("/proc/{tgid}")).exists()
    }

    fn name_of(&mut self, tgid: u32, thread: Option<&String>) -> String {
        if let Some(name) = self.names.get(&tgid) {
            return name.clone();
        }
        let named =
            self.is_first_namespace.then(|| std::fs::read(format!("/proc/{tgid}/comm")).ok()).flatten();
        let named = named.map(|name| text_of(&name)).filter(|name| !name.is_empty());
        let mut name = named.or_else(|| thread.cloned()).unwrap_or_else(|| "unknown".to_owned());
        let is_wanted = self.filter.name.as_ref() == Some(&name);
        if !is_wanted && !self.given.contains(&name) && self.given.len() >= NAMES_LIMIT {
            OTHER.clone_into(&mut name);
        }
        self.given.insert(name.clone());
        self.names.insert(tgid, name.clone());
        name
    }
}

/// What the maps of both objects hold, by process.
#[derive(Default)]
struct Tables {
    running: BTreeMap<u32, Activity>,
    /// Of these the maps hold nothing any more.
    ended: BTreeMap<u32, Activity>,
    threads: BTreeMap<u32, String>,
    lost: u64,
}

impl Tables {
    fn collect(&mut self, object: &mut Ebpf, ended: &BTreeSet<u32>) {
        self.each::<SeriesKey, HistogramRecord>(object, "series", ended, |key, record, activity| {
            if let Some(operation) = Operation::of(key.operation) {
                let calls = activity.calls.entry((operation, SizeClass(key.size_class))).or_default();
                calls.add(&record.into());
            }
        });
        self.each::<FailureKey, u64>(object, "failures", ended, |key, count, activity| {
            if let Some(operation) = Operation::of(key.operation) {
                *activity.failures.entry((operation, key.number.into())).or_default() += count;
            }
        });
        self.each::<u32, PressureRecord>(object, "pressures", ended, |_, record, activity| {
            let pressure = &mut activity.pressure;
            pressure.minor_faults += record.minor_faults;
            pressure.major_faults += record.major_faults;
            pressure.compactions += record.compactions;
            pressure.compaction += Duration::from_nanos(record.compaction_ns);
        });
        for (tgid, record) in entries::<u32, NameRecord>(object, "names") {
            // The kernel's object is read last, and knows better.
            self.threads.insert(tgid, text_of(&record.text));
            if ended.contains(&tgid) {
                remove::<u32, NameRecord>(object, "names", &tgid);
            }
        }
        let lost = object.map("lost").and_then(|map| Array::<&MapData, u64>::try_from(map).ok());
        self.lost += lost.map_or(0, |lost| (0..LOSSES).filter_map(|index| lost.get(&index, 0).ok()).sum());
    }

    /// Adds each entry of a map to its process. What cannot be taken out counts as a running process', or it
    /// would count twice.
    fn each<K: Pod + Ord + OfProcess, V: Pod>(
        &mut self,
        object: &mut Ebpf,
        map: &str,
        ended: &BTreeSet<u32>,
        add: impl Fn(K, V, &mut Activity),
    ) {
        for (key, value) in entries::<K, V>(object, map) {
            let tgid = key.tgid();
            let is_taken = ended.contains(&tgid) && remove::<K, V>(object, map, &key);
            let activities = if is_taken { &mut self.ended } else { &mut self.running };
            add(key, value, activities.entry(tgid).or_default());
        }
    }
}

/// A key with the process that the entry belongs to.
trait OfProcess {
    fn tgid(&self) -> u32;
}

impl OfProcess for SeriesKey {
    fn tgid(&self) -> u32 {
        self.tgid
    }
}

impl OfProcess for FailureKey {
    fn tgid(&self) -> u32 {
        self.tgid
    }
}

impl OfProcess for u32 {
    fn tgid(&self) -> u32 {
        *self
    }
}

fn tgids_in(object: &Ebpf) -> BTreeSet<u32> {
    let series = keys(table::<SeriesKey, HistogramRecord>(object, "series").as_ref());
    let failures = keys(table::<FailureKey, u64>(object, "failures").as_ref());
    series.iter().map(OfProcess::tgid).chain(failures.iter().map(OfProcess::tgid)).collect()
}

/// Every entry of a map, each once; none of a map that the object has not.
fn entries<K: Pod + Ord, V: Pod>(object: &Ebpf, name: &str) -> BTreeMap<K, V> {
    let table = table::<K, V>(object, name);
    let value = |key: K| Some((key, table.as_ref()?.get(&key, 0).ok()?));
    keys(table.as_ref()).into_iter().filter_map(value).collect()
}

fn table<'a, K: Pod, V: Pod>(object: &'a Ebpf, name: &str) -> Option<HashMap<&'a MapData, K, V>> {
    object.map(name).and_then(|map| HashMap::try_from(map).ok())
}

/// New ones may come while a table is walked, and the walk may begin anew: bounded, by twice the largest of them.
fn keys<K: Pod + Ord, V: Pod>(table: Option<&HashMap<&MapData, K, V>>) -> BTreeSet<K> {
    let keys = table.into_iter().flat_map(HashMap::keys);
    keys.take(2 * 4096).map_while(Result::ok).collect()
}

fn remove<K: Pod, V: Pod>(object: &mut Ebpf, name: &str, key: &K) -> bool {
    let map = object.map_mut(name).map(HashMap::<&mut MapData, K, V>::try_from);
    map.and_then(Result::ok).is_some_and(|mut map| map.remove(key).is_ok())
}

/// A name as the kernel has it: it ends with the first zero, or a line.
fn text_of(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| matches!(byte, 0 | b'\n')).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(filter: Filter) -> Reader {
        Reader { is_first_namespace: false, ..Reader::new(filter) }
    }

    #[test]
    fn size_classes_are_powers_of_two() {
        assert_eq!(SizeClass::of(4096), SizeClass::of(8191));
        assert_ne!(SizeClass::of(4096), SizeClass::of(8192));
        assert_eq!(SizeClass::of(6000).smallest_bytes(), Some(4096));
        assert_eq!(SizeClass(255).smallest_bytes(), None);
        assert_eq!(SizeClass::of(u64::MAX).smallest_bytes(), Some(1 << 63));
    }

    #[test]
    fn further_names_are_one() {
        let mut reader = reader(Filter::default());
        for tgid in 1..=100 {
            reader.name_of(tgid, Some(&format!("p{tgid}")));
        }
        assert_eq!(reader.name_of(64, None), "p64");
        assert_eq!(reader.name_of(65, None), OTHER);
        assert_eq!(reader.name_of(101, Some(&"p3".to_owned())), "p3");
        assert_eq!(reader.given.len(), 65);
    }

    #[test]
    fn process_keeps_the_name_that_it_had_first() {
        let mut reader = reader(Filter::default());
        assert_eq!(reader.name_of(7, Some(&"before".to_owned())), "before");
        assert_eq!(reader.name_of(7, Some(&"after".to_owned())), "before");
    }

    #[test]
    fn filter_takes_both_its_parts() {
        let reader = reader(Filter { pid: Some(7), name: Some("qemu".into()) });
        assert!(reader.counts(7, "qemu"));
        assert!(!reader.counts(8, "qemu") && !reader.counts(7, "other"));
    }

    #[test]
    fn own_process_has_its_name_and_has_not_ended() {
        let mut reader = Reader::new(Filter::default());
        let own = std::process::id();
        if !reader.is_first_namespace {
            eprintln!("SKIPPED: /proc of another pid namespace");
            return;
        }
        assert!(!reader.has_ended(own) && reader.has_ended(u32::MAX));
        let comm = std::fs::read("/proc/self/comm").expect("a name");
        assert_eq!(reader.name_of(own, None), text_of(&comm));
    }

    #[test]
    fn totals_are_of_one_operation() {
        let mut activity = Activity::default();
        let mut one = Histogram { bytes: 4096, ..Histogram::default() };
        one.slots[3] = 2;
        activity.calls.insert((Operation::Register, SizeClass::of(4096)), one);
        activity.calls.insert((Operation::Register, SizeClass::of(1 << 20)), one);
        activity.calls.insert((Operation::Pin, SizeClass::of(4096)), one);
        activity.failures.insert((Operation::Register, 12), 3);
        activity.failures.insert((Operation::Kernel, 12), 1);
        assert_eq!(
            (activity.total(Operation::Register).count(), activity.failed(Operation::Register)),
            (4, 3)
        );
        assert_eq!(activity.total(Operation::Deregister), Histogram::default());
        let mut twice = activity.clone();
        twice.add(&activity);
        assert_eq!((twice.total(Operation::Pin).count(), twice.failed(Operation::Register)), (4, 6));
    }
}
