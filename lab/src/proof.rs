//! The self-proving guest: what it is told and what it says.
//!
//! It writes a pattern over its memory, pass after pass, and checks before it
//! overwrites a page that the page holds exactly what the pass before left
//! there. `lab/guest/main.c` lists the lines it prints.

use std::fmt::Write as _;

/// Size of the pages the guest writes and checks.
pub const PAGE_BYTES: u64 = 4096;

pub(crate) const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/proof-guest.elf"));

/// What the pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Words without any pattern to them.
    Random,
    /// Words at a constant distance: cheaper, so that more is written a second.
    Stamp,
    /// Half of the pages become all zero in each pass, the other half cease to be.
    Zero,
}

/// Where in its memory the guest works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// MiB by MiB over all of it: over every block.
    Spread,
    /// In one piece, from the lowest address.
    Packed,
}

/// What the self-proving guest does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Memory that is checked and written, over and over.
    pub mib: u64,
    /// Memory that is written once and from then on only checked.
    pub touch_mib: u64,
    /// MiB of `mib` written a second; 0: as fast as it goes.
    pub rate_mib: u64,
    /// MiB of `touch_mib` checked a second.
    pub verify_rate_mib: u64,
    /// Milliseconds between ticks; 2 is the least that it can keep.
    pub tick_ms: u64,
    /// Guests with different seeds write different patterns.
    pub seed: u64,
    /// What the pages hold.
    pub fill: Fill,
    /// Where they are.
    pub place: Place,
}

impl Default for Workload {
    fn default() -> Self {
        Workload {
            mib: 64,
            touch_mib: 0,
            rate_mib: 0,
            verify_rate_mib: 64,
            tick_ms: 50,
            seed: 0,
            fill: Fill::Random,
            place: Place::Spread,
        }
    }
}

impl Workload {
    /// The kernel command line. The guest finds `extra` ranges of memory, each
    /// a start and a length, only by being told: DIMMs are not in its memory map.
    pub(crate) fn command_line(&self, extra: &[(u64, u64)]) -> String {
        let Workload { mib, touch_mib, rate_mib, verify_rate_mib, tick_ms, seed, .. } = self;
        let fill = match self.fill {
            Fill::Random => "random",
            Fill::Stamp => "stamp",
            Fill::Zero => "zero",
        };
        let place = match self.place {
            Place::Spread => "spread",
            Place::Packed => "packed",
        };
        let mut line = format!(
            "mib={mib} touch={touch_mib} rate={rate_mib} verify={verify_rate_mib} tick={tick_ms} seed={seed} \
             fill={fill} place={place}"
        );
        for (start, length) in extra {
            write!(line, " range={start:#x},{length:#x}").expect("writing to a String does not fail");
        }
        line
    }
}

/// `TICK`: the guest is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Counts up from 0, one a tick.
    pub n: u64,
    /// The pass it is in.
    pub pass: u64,
    /// Checked since the start, in every pass.
    pub pages_checked: u64,
    /// Pages found wrong since the start.
    pub errors: u64,
    /// Its time stamp counter.
    pub tsc: u64,
    /// Microseconds since `READY` on that clock.
    pub us: u64,
    /// The longest that one page took since the last tick.
    pub worst_us: u64,
}

impl Tick {
    /// Parses a line of the guest.
    pub fn parse(line: &str) -> Option<Tick> {
        let fields = Fields::of(line, "TICK")?;
        Some(Tick {
            n: fields.number("n")?,
            pass: fields.number("pass")?,
            pages_checked: fields.number("pages_checked")?,
            errors: fields.number("errors")?,
            tsc: fields.number("tsc")?,
            us: fields.number("us")?,
            worst_us: fields.number("worst_us")?,
        })
    }
}

/// `LOST`: a page that does not hold what the guest left there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// `work` (written in every pass) or `idle` (written once).
    pub set: String,
    /// `stale`: an older pass' page; `torn`: partly an older pass'; `zero`; `foreign`.
    pub kind: String,
    /// The guest's page frame number.
    pub page: u64,
    /// Of the first wrong word in it.
    pub offset: u64,
    /// What the word had to be.
    pub want: u64,
    /// What it is.
    pub have: u64,
    /// How many words are wrong, of 512.
    pub words: u64,
    /// For `stale`, how many passes old.
    pub age: u64,
}

impl Lost {
    /// Parses a line of the guest.
    pub fn parse(line: &str) -> Option<Lost> {
        let fields = Fields::of(line, "LOST")?;
        Some(Lost {
            set: fields.get("set")?.to_owned(),
            kind: fields.get("kind")?.to_owned(),
            page: fields.number("page")?,
            offset: fields.number("offset")?,
            want: fields.number("want")?,
            have: fields.number("have")?,
            words: fields.number("words")?,
            age: fields.number("age")?,
        })
    }

    /// Where the page is in the guest's memory.
    pub fn guest_address(&self) -> u64 {
        self.page * PAGE_BYTES
    }
}

/// `VERIFIED`: the answer to the command to check everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// How many were checked: all of them.
    pub pages: u64,
    /// How many of those were wrong.
    pub errors: u64,
}

impl Verified {
    /// Parses a line of the guest.
    pub fn parse(line: &str) -> Option<Verified> {
        let fields = Fields::of(line, "VERIFIED")?;
        Some(Verified { pages: fields.number("pages")?, errors: fields.number("errors")? })
    }
}

/// The `key=value` words of one line.
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn of(line: &'a str, word: &str) -> Option<Self> {
        line.strip_prefix(word)?.strip_prefix(' ').map(Fields)
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.split(' ').find_map(|field| field.strip_prefix(key)?.strip_prefix('='))
    }

    fn number(&self, key: &str) -> Option<u64> {
        let value = self.get(key)?;
        match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => value.parse().ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_read_whole_or_not_at_all() {
        let line = "TICK n=3 pass=2 pages_checked=67728 errors=0 tsc=3960515364 us=201747 worst_us=64";
        let tick = Tick::parse(line).unwrap();
        assert_eq!((tick.n, tick.pass, tick.errors, tick.us, tick.worst_us), (3, 2, 0, 201_747, 64));
        assert_eq!(Tick::parse("TICK n=3 pass=2 pages_checked=67"), None);
        assert_eq!(Tick::parse("n=3 pass=2"), None);
    }

    #[test]
    fn a_lost_page_is_read() {
        let line = "LOST set=work kind=torn page=0x4d2 offset=0x18 want=0xff have=0x0 words=12 pass=7 age=0";
        let lost = Lost::parse(line).unwrap();
        assert_eq!((lost.page, lost.offset, lost.want, lost.words), (0x4d2, 0x18, 0xff, 12));
        assert_eq!(lost.guest_address(), 0x4d2_000);
        assert_eq!((lost.set.as_str(), lost.kind.as_str()), ("work", "torn"));
    }

    #[test]
    fn dimms_are_told_to_the_guest() {
        let line = Workload::default().command_line(&[(0x1_4000_0000, 0x1000_0000)]);
        assert!(line.ends_with("fill=random place=spread range=0x140000000,0x10000000"), "{line}");
    }
}
