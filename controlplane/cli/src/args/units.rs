//! Quantities as people write them: `10Gbit`, `4GiB`, `15ms`.
//!
//! Strict on purpose: a quantity without a unit, or in a unit whose case is
//! wrong (`mbit` is a thousandth of a bit), is refused with what to write.

use std::str::FromStr;
use std::time::Duration;

/// The longest duration that is taken: more is a slip of the finger.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// Bits per second; none is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BandwidthLimit(Option<u64>);

/// Bytes; none is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PinBudget(Option<u64>);

/// Bytes, at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteCount(pub(crate) u64);

/// The most processor time that may be taken from a guest; none is not to take any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Throttle(Option<u8>);

/// A duration, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timeout(pub(crate) Option<Duration>);

/// Why a quantity was not understood, and what to write.
#[derive(Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum UnitError {
    #[error("it does not begin with a number; write for example {example}")]
    NoNumber { example: &'static str },
    #[error("it has no unit; write for example {example}")]
    NoUnit { example: &'static str },
    #[error("`{unit}` is no unit of {quantity}{}; known are {known}", did_you_mean(.meant))]
    UnknownUnit { unit: String, quantity: &'static str, known: String, meant: Option<&'static str> },
    #[error("it is not a whole number of {base}")]
    NotWhole { base: &'static str },
    #[error("it is more than {} {base}", u64::MAX)]
    TooLarge { base: &'static str },
    #[error("nothing moves at zero; write `none` for no limit")]
    Zero,
    #[error("nothing is measured with zero bytes; write for example {example}")]
    ZeroBytes { example: &'static str },
    #[error("it is no whole number from 1 to 99, in percent; write for example 80, or `none`")]
    NoPercent,
    #[error("{0}; write for example 15ms, 2s or 1m30s")]
    Duration(#[from] humantime::DurationError),
    #[error("a duration of zero cannot be kept; write for example 15ms")]
    ZeroDuration,
    #[error("it is longer than a year; write `none` where no limit is meant")]
    LongDuration,
}

fn did_you_mean(unit: &Option<&'static str>) -> String {
    unit.map_or_else(String::new, |unit| format!(" (`{unit}`?)"))
}

impl BandwidthLimit {
    /// As the protocol has it: 0 is no limit.
    pub(crate) fn bits_per_second(self) -> u64 {
        self.0.unwrap_or(0)
    }
}

impl PinBudget {
    /// As the protocol has it: 0 is no limit.
    pub(crate) fn bytes(self) -> u64 {
        self.0.unwrap_or(0)
    }
}

impl Throttle {
    /// As the protocol has it: 0 takes none.
    pub(crate) fn max_percent(self) -> u32 {
        self.0.unwrap_or(0).into()
    }
}

impl FromStr for Throttle {
    type Err = UnitError;

    fn from_str(value: &str) -> Result<Self, UnitError> {
        if value == "none" {
            return Ok(Self(None));
        }
        let percent = value.strip_suffix('%').unwrap_or(value).parse();
        percent
            .ok()
            .filter(|percent| (1..=99).contains(percent))
            .map(|percent| Self(Some(percent)))
            .ok_or(UnitError::NoPercent)
    }
}

impl FromStr for BandwidthLimit {
    type Err = UnitError;

    fn from_str(value: &str) -> Result<Self, UnitError> {
        BANDWIDTH.parse_limit(value).map(Self)
    }
}

impl FromStr for PinBudget {
    type Err = UnitError;

    fn from_str(value: &str) -> Result<Self, UnitError> {
        SIZE.parse_limit(value).map(Self)
    }
}

impl FromStr for ByteCount {
    type Err = UnitError;

    fn from_str(value: &str) -> Result<Self, UnitError> {
        match SIZE.parse(value)? {
            0 => Err(UnitError::ZeroBytes { example: SIZE.example }),
            bytes => Ok(Self(bytes)),
        }
    }
}

impl FromStr for Timeout {
    type Err = UnitError;

    fn from_str(value: &str) -> Result<Self, UnitError> {
        if value == "none" { Ok(Self(None)) } else { duration(value).map(|duration| Self(Some(duration))) }
    }
}

/// A duration above zero, and of a year at most.
pub(crate) fn duration(value: &str) -> Result<Duration, UnitError> {
    let duration = humantime::parse_duration(value)?;
    if duration.is_zero() {
        return Err(UnitError::ZeroDuration);
    }
    if duration > LONGEST {
        return Err(UnitError::LongDuration);
    }
    Ok(duration)
}

/// The units of one quantity, each with its size in the quantity's base.
struct Quantity {
    name: &'static str,
    base: &'static str,
    example: &'static str,
    units: &'static [(&'static str, u64)],
}

const BANDWIDTH: Quantity = Quantity {
    name: "bandwidth",
    base: "bits per second",
    example: "10Gbit or 800MiB/s",
    units: &[
        ("bit", 1),
        ("kbit", 1_000),
        ("Mbit", 1_000_000),
        ("Gbit", 1_000_000_000),
        ("Tbit", 1_000_000_000_000),
        ("bit/s", 1),
        ("kbit/s", 1_000),
        ("Mbit/s", 1_000_000),
        ("Gbit/s", 1_000_000_000),
        ("Tbit/s", 1_000_000_000_000),
        ("B/s", 8),
        ("kB/s", 8_000),
        ("MB/s", 8_000_000),
        ("GB/s", 8_000_000_000),
        ("KiB/s", 8 << 10),
        ("MiB/s", 8 << 20),
        ("GiB/s", 8 << 30),
    ],
};

const SIZE: Quantity = Quantity {
    name: "size",
    base: "bytes",
    example: "4GiB or 512MiB",
    units: &[
        ("B", 1),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
    ],
};

impl Quantity {
    fn parse_limit(&self, value: &str) -> Result<Option<u64>, UnitError> {
        if value == "none" {
            return Ok(None);
        }
        match self.parse(value)? {
            0 => Err(UnitError::Zero),
            amount => Ok(Some(amount)),
        }
    }

    fn parse(&self, value: &str) -> Result<u64, UnitError> {
        let end = value.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(value.len());
        let (number, unit) = value.split_at(end);
        let no_number = UnitError::NoNumber { example: self.example };
        let (whole, fraction) = match number.split_once('.') {
            Some((_, "")) => return Err(no_number),
            Some((whole, fraction)) => (whole, fraction.trim_end_matches('0')),
            None => (number, ""),
        };
        if whole.is_empty() || fraction.contains('.') {
            return Err(no_number);
        }
        if unit.is_empty() {
            return Err(UnitError::NoUnit { example: self.example });
        }
        self.scale(whole, fraction, self.unit(unit)?)
    }

    fn unit(&self, unit: &str) -> Result<u64, UnitError> {
        if let Some((_, size)) = self.units.iter().find(|(name, _)| *name == unit) {
            return Ok(*size);
        }
        Err(UnitError::UnknownUnit {
            unit: unit.to_owned(),
            quantity: self.name,
            known: self.units.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
            meant: self.units.iter().map(|(name, _)| *name).find(|name| name.eq_ignore_ascii_case(unit)),
        })
    }

    /// `whole.fraction` units in the base, exactly.
    fn scale(&self, whole: &str, fraction: &str, unit: u64) -> Result<u64, UnitError> {
        let too_large = || UnitError::TooLarge { base: self.base };
        let not_whole = || UnitError::NotWhole { base: self.base };
        let whole: u64 = whole.parse().map_err(|_| too_large())?;
        let mut base = u128::from(whole) * u128::from(unit);
        if !fraction.is_empty() {
            // Eighteen digits stay far inside u128 beside the largest unit.
            let digits = u32::try_from(fraction.len()).ok().filter(|digits| *digits <= 18);
            let divisor = 10_u128.pow(digits.ok_or_else(not_whole)?);
            let scaled = fraction.parse::<u128>().map_err(|_| not_whole())? * u128::from(unit);
            if scaled % divisor != 0 {
                return Err(not_whole());
            }
            base += scaled / divisor;
        }
        u64::try_from(base).map_err(|_| too_large())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bandwidth(value: &str) -> Result<u64, UnitError> {
        value.parse::<BandwidthLimit>().map(BandwidthLimit::bits_per_second)
    }

    fn size(value: &str) -> Result<u64, UnitError> {
        value.parse::<PinBudget>().map(PinBudget::bytes)
    }

    #[test]
    fn bandwidth_is_decimal_bits_or_bytes_with_per_second() {
        assert_eq!(bandwidth("10Gbit"), Ok(10_000_000_000));
        assert_eq!(bandwidth("2.5Gbit/s"), Ok(2_500_000_000));
        assert_eq!(bandwidth("800MiB/s"), Ok((800 * 8) << 20));
        assert_eq!(bandwidth("1MB/s"), Ok(8_000_000));
        assert_eq!(bandwidth("1bit"), Ok(1));
        assert_eq!(bandwidth("none"), Ok(0));
    }

    #[test]
    fn size_is_binary_or_decimal_as_written() {
        assert_eq!(size("4GiB"), Ok(4 << 30));
        assert_eq!(size("4GB"), Ok(4_000_000_000));
        assert_eq!(size("0.5KiB"), Ok(512));
        assert_eq!(size("1.50MiB"), Ok(3 << 19));
        assert_eq!("64KiB".parse(), Ok(ByteCount(64 << 10)));
        assert!("0KiB".parse::<ByteCount>().expect_err("nothing").to_string().contains("zero bytes"));
    }

    #[test]
    fn every_refusal_says_what_to_write() {
        let says = |value: &str, expected: &str| {
            let error = bandwidth(value).expect_err(value).to_string();
            assert!(error.contains(expected), "{value}: {error}");
        };
        says("10", "it has no unit; write for example 10Gbit");
        says("fast", "does not begin with a number");
        says("", "does not begin with a number");
        says("-1Gbit", "does not begin with a number");
        says(".5Gbit", "does not begin with a number");
        says("5.Gbit", "does not begin with a number");
        says("1.2.3Gbit", "does not begin with a number");
        says("10gbit", "`gbit` is no unit of bandwidth (`Gbit`?)");
        says("10 Gbit", "` Gbit` is no unit");
        says("10MiB", "`MiB` is no unit of bandwidth; known are bit, kbit");
        says("0.5bit", "not a whole number of bits per second");
        says("0Gbit", "write `none` for no limit");
        says("99999999999Tbit", "more than 18446744073709551615 bits per second");
        says("99999999999999999999999bit", "more than");
        says("0.0000000000000000001Tbit", "not a whole number");
    }

    #[test]
    fn duration_needs_a_unit_and_a_length() {
        assert_eq!(duration("15ms"), Ok(Duration::from_millis(15)));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("0ms"), Err(UnitError::ZeroDuration));
        assert_eq!(duration("500days"), Err(UnitError::LongDuration));
        assert!(duration("15").expect_err("no unit").to_string().contains("15ms"));
        assert_eq!("none".parse(), Ok(Timeout(None)));
        assert_eq!("30s".parse(), Ok(Timeout(Some(Duration::from_secs(30)))));
    }
}
