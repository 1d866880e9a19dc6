//! What is printed on stdout, and how quantities are written.

use std::io::{self, Write as _};
use std::time::Duration;

use serde::Serialize;

use crate::failure::Failure;

pub(crate) mod bench;
pub(crate) mod doctor;
pub(crate) mod probe;
pub(crate) mod report;
pub(crate) mod summary;
pub(crate) mod table;

/// Whether what was printed is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Printed {
    /// As far as can be told.
    Read,
    /// The reader has gone.
    NobodyReads,
}

/// Prints on stdout. A reader that has gone (`| head`) wants no more.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    print_while_read(text).map(|_| ())
}

/// Prints on stdout, where more is to come if somebody reads it.
pub(crate) fn print_while_read(text: &str) -> Result<Printed, Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(Printed::Read),
        Err(source) if source.kind() == io::ErrorKind::BrokenPipe => Ok(Printed::NobodyReads),
        Err(source) => Err(Failure::System { what: "cannot write to stdout", source }),
    }
}

/// Prints one JSON object on a line of its own.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&to_json_line(value)?)
}

/// One JSON object, and the end of its line.
pub(crate) fn to_json_line(value: &impl Serialize) -> Result<String, Failure> {
    let mut line = serde_json::to_string(value)
        .map_err(|source| Failure::System { what: "cannot write JSON", source: source.into() })?;
    line.push('\n');
    Ok(line)
}

/// Text from elsewhere with its control characters shown, so that it cannot drive the terminal.
pub(crate) fn printable(text: &str) -> String {
    let show =
        |c: char| if c.is_control() && c != '\n' { c.escape_unicode().to_string() } else { c.to_string() };
    text.chars().map(show).collect()
}

/// `1.50 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// `38.1 Gbit/s`.
pub(crate) fn bit_rate(bits_per_second: u64) -> String {
    scaled(bits_per_second as f64, 1000.0, &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s", "Pbit/s"])
}

/// `12.3 ms`, `4.21 s`, `1h 2m 3s`.
pub(crate) fn duration(duration: Duration) -> String {
    if duration >= Duration::from_secs(60) {
        return humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string();
    }
    let nanoseconds = duration.as_nanos() as f64;
    match nanoseconds {
        0.0 => "0 s".to_owned(),
        n if n < 1e6 => format!("{} us", three_digits(n / 1e3)),
        n if n < 1e9 => format!("{} ms", three_digits(n / 1e6)),
        n => format!("{} s", three_digits(n / 1e9)),
    }
}

/// A duration of the protocol; none where it is unset, or negative.
pub(crate) fn proto_duration(duration: Option<&prost_types::Duration>) -> Option<Duration> {
    duration.and_then(|duration| Duration::try_from(*duration).ok())
}

/// `2026-01-31T12:00:00Z`; none where it is unset, or before 1970.
pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = std::time::SystemTime::try_from(*time?).ok()?;
    time.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(humantime::format_rfc3339_millis(time).to_string())
}

fn scaled(amount: f64, step: f64, units: &[&str]) -> String {
    let mut amount = amount;
    let mut unit = units[0];
    for larger in &units[1..] {
        if amount < step {
            break;
        }
        amount /= step;
        unit = larger;
    }
    if unit == units[0] { format!("{amount} {unit}") } else { format!("{} {unit}", three_digits(amount)) }
}

fn three_digits(amount: f64) -> String {
    match amount {
        a if a < 9.995 => format!("{a:.2}"),
        a if a < 99.95 => format!("{a:.1}"),
        a => format!("{a:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_three_digits_and_a_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(bit_rate(38_100_000_000), "38.1 Gbit/s");
        assert_eq!(bit_rate(999), "999 bit/s");
    }

    #[test]
    fn durations_choose_their_unit() {
        assert_eq!(duration(Duration::ZERO), "0 s");
        assert_eq!(duration(Duration::from_micros(12)), "12.0 us");
        assert_eq!(duration(Duration::from_micros(12_300)), "12.3 ms");
        assert_eq!(duration(Duration::from_millis(4_210)), "4.21 s");
        assert_eq!(duration(Duration::from_millis(3_723_900)), "1h 2m 3s");
    }

    #[test]
    fn control_characters_from_elsewhere_are_shown() {
        assert_eq!(printable("a\u{1b}[31mb\nc\r"), "a\\u{1b}[31mb\nc\\u{d}");
    }

    #[test]
    fn negative_protocol_times_are_none() {
        assert_eq!(proto_duration(Some(&prost_types::Duration { seconds: -1, nanos: 0 })), None);
        assert_eq!(time(Some(&prost_types::Timestamp { seconds: -1, nanos: 0 })), None);
        assert_eq!(
            time(Some(&prost_types::Timestamp { seconds: 0, nanos: 5_000_000 })).as_deref(),
            Some("1970-01-01T00:00:00.005Z")
        );
    }
}
