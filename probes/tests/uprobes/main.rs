//! The probes against a stand-in of libibverbs that registers a known number of
//! times: everything is counted, once, by its size and its errno. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod standin;

use std::collections::BTreeMap;
use std::time::Duration;

use ramferry_probes::{BOUNDS_US, Filter, Operation, Options, Probe, ProbeState, Probes, SizeClass};

use standin::{Caller, Standin, may_probe};

const THREADS: u64 = 3;
const SIZES: [u64; 4] = [4096, 65536, 1 << 20, 4 << 20];

fn options(standin: &Standin) -> Options {
    Options { libraries: vec![standin.library()], filter: Filter::default() }
}

#[test]
fn every_call_of_any_process_is_counted_once_by_size_and_errno() {
    if !may_probe() {
        return;
    }
    let standin = Standin::build();
    let mut caller = Caller::start(&standin);
    let mut probes = Probes::attach(options(&standin));
    for probe in
        [Probe::IbvRegMr, Probe::IbvRegMrIova, Probe::IbvRegMrIova2, Probe::IbvDeregMr, Probe::IbvCmdRegMr]
    {
        assert_eq!(probes.states()[&probe], ProbeState::Attached, "{probe:?}");
    }
    // The stand-in is older than registration of a dma-buf.
    let absence = probes.states()[&Probe::IbvRegDmabufMr].absence().unwrap().clone();
    assert_eq!(absence.code(), "symbol_missing");
    assert!(absence.to_string().contains("ibv_reg_dmabuf_mr"), "{absence}");

    let timed = caller.work();
    let alive = probes.read();
    caller.end();
    let ended = probes.read();
    assert_eq!(alive, ended, "nothing is lost or counted again when a process ends");
    assert_eq!(ended, probes.read());

    assert_eq!(ended.lost, 0);
    let names: Vec<_> = ended.processes.keys().map(String::as_str).collect();
    assert_eq!(names, ["caller"]);
    let seen = &ended.processes["caller"];
    let counts = |operation| {
        let calls = seen.calls.iter().filter(move |((of, _), _)| *of == operation);
        calls
            .map(|((_, size), calls)| (size.smallest_bytes(), (calls.count(), calls.bytes)))
            .collect::<Vec<_>>()
    };
    // Seven that failed, and one.
    let small = (Some(8192), (8 * THREADS, 8192 * THREADS));
    let sized = |bytes: u64| (Some(bytes), (20 * THREADS, 20 * THREADS * bytes));
    assert_eq!(
        counts(Operation::Register),
        [sized(SIZES[0]), small, sized(SIZES[1]), sized(SIZES[2]), sized(SIZES[3])]
    );
    // One failed and was tried again; one was registered before anybody looked.
    let small = (Some(8192), (2 * THREADS, 8192 * THREADS));
    assert_eq!(
        counts(Operation::Deregister),
        [sized(SIZES[0]), small, sized(SIZES[1]), sized(SIZES[2]), sized(SIZES[3]), (None, (1, 0))]
    );
    let failures = BTreeMap::from([
        ((Operation::Register, 12), 5 * THREADS),
        ((Operation::Register, 14), 2 * THREADS),
        ((Operation::Deregister, 16), THREADS),
    ]);
    assert_eq!(seen.failures, failures);
    for bytes in [SIZES[0], 8192, SIZES[1], SIZES[2], SIZES[3]] {
        let histogram = &seen.calls[&(Operation::Register, SizeClass::of(bytes))];
        standin::assert_between(histogram, &timed[&bytes], bytes);
    }
}

#[test]
fn histograms_agree_with_in_process_timing_within_one_bucket() {
    if !may_probe() {
        return;
    }
    let standin = Standin::build();
    let mut caller = Caller::start(&standin);
    let mut probes = Probes::attach(options(&standin));
    let timed = caller.work();
    let seen = probes.read();
    // Where the call is long against the probe itself.
    let bytes = SIZES[3];
    let histogram = &seen.processes["caller"].calls[&(Operation::Register, SizeClass::of(bytes))];
    let median = |mut ns: Vec<u64>| {
        ns.sort_unstable();
        Duration::from_nanos(ns[ns.len() / 2])
    };
    let slot =
        |duration: Duration| BOUNDS_US.iter().position(|&us| duration <= Duration::from_micros(us)).unwrap();
    let own = slot(median(timed[&bytes].iter().map(|call| call.outer_ns).collect()));
    let probed = slot(histogram.quantile(0.5).unwrap());
    assert!(own.abs_diff(probed) <= 1, "{own} and {probed}");
    let mean = histogram.sum / u32::try_from(histogram.count()).unwrap();
    assert!(mean <= histogram.max && !mean.is_zero());
    caller.end();
}

#[test]
fn filter_leaves_the_others_out() {
    if !may_probe() {
        return;
    }
    let standin = Standin::build();
    let mut caller = Caller::start(&standin);
    let mut other = Caller::start(&standin);
    let filter = Filter { pid: Some(caller.pid()), name: None };
    let mut probes = Probes::attach(Options { filter, ..options(&standin) });
    other.work();
    caller.work();
    let registered = probes.read().processes["caller"].total(Operation::Register).count();
    assert_eq!(registered, THREADS * (4 * 20 + 8));
    other.end();
    caller.end();
    assert_eq!(probes.read().processes["caller"].total(Operation::Register).count(), registered);
}

#[test]
fn detached_probes_leave_nothing_behind_and_can_be_attached_again() {
    if !may_probe() {
        return;
    }
    let standin = Standin::build();
    let mut caller = Caller::start(&standin);
    drop(Probes::attach(options(&standin)));
    let mut probes = Probes::attach(options(&standin));
    assert!(probes.read().processes.is_empty());
    caller.work();
    assert_eq!(probes.read().processes["caller"].total(Operation::Register).count(), THREADS * (4 * 20 + 8));
    caller.end();
}

#[test]
fn library_that_is_none_leaves_every_probe_absent_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let library = directory.path().join("libibverbs.so.1");
    std::fs::write(&library, "not a library").unwrap();
    let mut probes = Probes::attach(Options { libraries: vec![library], filter: Filter::default() });
    assert_eq!(probes.states().len(), Probe::ALL.len());
    for probe in [Probe::IbvRegMr, Probe::IbvCmdRegMr] {
        let absence = probes.states()[&probe].absence().unwrap();
        assert!(absence.code() == "library_unreadable" || !may_probe(), "{absence}");
    }
    assert!(probes.read().processes.is_empty());
}
