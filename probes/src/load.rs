//! Loads the objects, and attaches what can be attached.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aya::programs::uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeScope};
use aya::programs::{KProbe, Program, ProgramError, UProbe};
use aya::{Btf, Ebpf, EbpfLoader, include_bytes_aligned};

use crate::absence::KERNEL as THE_KERNEL;
use crate::library::{Target, standard_libraries};
use crate::probe::{Place, Probe, ProbeState};
use crate::reading::{Filter, Reader, Snapshot};
use crate::{Absence, capabilities};

static UPROBES: &[u8] = include_bytes_aligned!("../objects/uprobes.bpf.o");
static KERNEL: &[u8] = include_bytes_aligned!("../objects/kernel.bpf.o");

const PERF_DEVICES: &str = "/sys/bus/event_source/devices";
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// What is probed.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Libraries to be probed; the host's own where none is named.
    pub libraries: Vec<PathBuf>,
    /// Whose calls count.
    pub filter: Filter,
}

/// Probes that are attached, as far as they can be; detached when dropped.
pub struct Probes {
    uprobes: Option<Ebpf>,
    kernel: Option<Ebpf>,
    libraries: Vec<PathBuf>,
    states: BTreeMap<Probe, ProbeState>,
    reader: Reader,
}

impl Probes {
    /// Attaches all that can be attached here. Takes tens of milliseconds: not for a thread that others wait for.
    pub fn attach(options: Options) -> Self {
        let libraries = if options.libraries.is_empty() { standard_libraries() } else { options.libraries };
        let mut states = BTreeMap::new();
        let uprobes = attach_uprobes(&libraries, &mut states);
        let kernel = attach_kernel(&mut states);
        Self { uprobes, kernel, libraries, states, reader: Reader::new(options.filter) }
    }

    /// Each probe, and whether it is attached.
    pub fn states(&self) -> &BTreeMap<Probe, ProbeState> {
        &self.states
    }

    /// The libraries that are probed.
    pub fn libraries(&self) -> &[PathBuf] {
        &self.libraries
    }

    /// All that was seen since they were attached.
    pub fn read(&mut self) -> Snapshot {
        self.reader.read([self.uprobes.as_mut(), self.kernel.as_mut()])
    }
}

impl std::fmt::Debug for Probes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probes").field("states", &self.states).finish_non_exhaustive()
    }
}

fn attach_uprobes(libraries: &[PathBuf], states: &mut BTreeMap<Probe, ProbeState>) -> Option<Ebpf> {
    let mut object = match load_uprobes(libraries) {
        Ok(object) => object,
        Err(absence) => {
            all_absent(Place::Libibverbs, &absence, states);
            return None;
        }
    };
    let targets: Vec<_> =
        libraries.iter().map(|path| Target::open(path, probes_of(Place::Libibverbs))).collect();
    for probe in probes_of(Place::Libibverbs) {
        // One library's trouble keeps no other's calls from being seen.
        let attached: Vec<_> =
            targets.iter().map(|target| attach_uprobe(&mut object, probe, target)).collect();
        insert(states, probe, attached.into_iter().collect());
    }
    Some(object)
}

fn load_uprobes(libraries: &[PathBuf]) -> Result<Ebpf, Absence> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(Absence::Architecture);
    }
    if libraries.is_empty() {
        return Err(Absence::NoLibibverbs);
    }
    if !Path::new(PERF_DEVICES).join("uprobe").exists() {
        return Err(Absence::NoUprobes);
    }
    // The kernel's type information is not needed, and may not be there.
    EbpfLoader::new().btf(None).load(UPROBES).map_err(|error| Absence::of_load(&error))
}

fn attach_uprobe(object: &mut Ebpf, probe: Probe, target: &Target) -> Result<(), Absence> {
    let offset = target.offset(probe)?;
    let place = target.path.display().to_string();
    attach_each::<UProbe>(object, probe, &place, |program| {
        if program.fd().is_err() {
            program.load()?;
        }
        let location = UProbeAttachLocation::AbsoluteOffset(offset);
        let point = UProbeAttachPoint { location, cookie: Some(probe.number()) };
        let link = program.attach(point, &target.path, UProbeScope::AllProcesses)?;
        Ok(Box::new(move |program: &mut UProbe| program.detach(link)))
    })
}

fn attach_kernel(states: &mut BTreeMap<Probe, ProbeState>) -> Option<Ebpf> {
    let mut object = match load_kernel() {
        Ok(object) => object,
        Err(absence) => {
            all_absent(Place::Kernel, &absence, states);
            return None;
        }
    };
    for probe in probes_of(Place::Kernel) {
        let is_attached = |needed: &Probe| states.get(needed).is_some_and(ProbeState::is_attached);
        let attached = match probe.needs().filter(|needed| !is_attached(needed)) {
            Some(needed) => Err(Absence::Needs(needed)),
            None => attach_kprobe(&mut object, probe),
        };
        insert(states, probe, attached);
    }
    Some(object)
}

fn load_kernel() -> Result<Ebpf, Absence> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(Absence::Architecture);
    }
    if !Path::new(PERF_DEVICES).join("kprobe").exists() {
        return Err(Absence::NoKprobes);
    }
    if !Path::new(KERNEL_BTF).exists() {
        return Err(Absence::NoBtf);
    }
    // Reading the type information costs more than all the rest: not where nothing can be loaded anyway.
    let missing = capabilities::missing();
    if !missing.is_empty() {
        return Err(Absence::NoCapability { missing });
    }
    let btf = Btf::from_sys_fs().map_err(|error| Absence::Failed {
        step: "reading the type information",
        reason: error.to_string(),
    })?;
    EbpfLoader::new().btf(Some(&btf)).load(KERNEL).map_err(|error| Absence::of_load(&error))
}

fn attach_kprobe(object: &mut Ebpf, probe: Probe) -> Result<(), Absence> {
    attach_each::<KProbe>(object, probe, THE_KERNEL, |program| {
        if program.fd().is_err() {
            program.load()?;
        }
        let link = program.attach(probe.as_str(), 0)?;
        Ok(Box::new(move |program: &mut KProbe| program.detach(link)))
    })
}

/// Detaches what was attached.
type Undo<P> = Box<dyn FnOnce(&mut P) -> Result<(), ProgramError>>;

/// Attaches the programs of a probe one by one; all of them, or none.
fn attach_each<P>(
    object: &mut Ebpf,
    probe: Probe,
    place: &str,
    attach: impl Fn(&mut P) -> Result<Undo<P>, ProgramError>,
) -> Result<(), Absence>
where
    for<'a> &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let mut attached: Vec<(&str, Undo<P>)> = Vec::new();
    for &name in probe.programs() {
        match program(object, name).and_then(&attach) {
            Ok(undo) => attached.push((name, undo)),
            Err(error) => {
                for (name, undo) in attached {
                    // A program that cannot be detached sees ends without beginnings, which do not count.
                    let _ = program(object, name).and_then(undo);
                }
                return Err(Absence::of_attach(&error, probe.as_str(), place));
            }
        }
    }
    Ok(())
}

fn program<'a, P>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut P, ProgramError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    object.program_mut(name).expect("the objects have every program of the list").try_into()
}

/// The probes of one place.
fn probes_of(place: Place) -> impl Iterator<Item = Probe> {
    Probe::ALL.into_iter().filter(move |probe| probe.place() == place)
}

fn insert(states: &mut BTreeMap<Probe, ProbeState>, probe: Probe, attached: Result<(), Absence>) {
    states.insert(probe, attached.map_or_else(ProbeState::Absent, |()| ProbeState::Attached));
}

fn all_absent(place: Place, absence: &Absence, states: &mut BTreeMap<Probe, ProbeState>) {
    for probe in probes_of(place) {
        insert(states, probe, Err(absence.clone()));
    }
}
