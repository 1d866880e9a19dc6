//! What was measured, as a table and as JSON.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

/// More do not fit beside one another.
const SAMPLES_A_TABLE: usize = 5;

/// One case, measured several times.
#[derive(Debug)]
struct Row {
    name: String,
    bytes: Option<u64>,
    seconds: Vec<f64>,
    of: Option<String>,
    /// Where it is not the quotient of two rates.
    ratio: Option<f64>,
    /// What else was measured of it, in the order of the first measurement.
    samples: Vec<(String, Vec<f64>)>,
    more: Map<String, Value>,
}

/// Every case, in the order of their first measurement.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Adds one measurement of a case: `bytes` in `seconds`.
    pub(crate) fn add(&mut self, name: &str, bytes: u64, seconds: f64) {
        let row = self.row(name);
        row.bytes = Some(bytes);
        row.seconds.push(seconds);
    }

    /// Adds one measurement of a case that is only a time.
    pub(crate) fn add_time(&mut self, name: &str, seconds: f64) {
        self.row(name).seconds.push(seconds);
    }

    /// Adds an amount of memory, as a share of another.
    pub(crate) fn add_share(&mut self, name: &str, bytes: u64, of: &str, of_bytes: u64) {
        let row = self.row(name);
        row.bytes = Some(bytes);
        row.ratio = Some(bytes as f64 / of_bytes as f64);
        row.of = Some(of.to_owned());
    }

    /// Adds one measurement of something else of a case; the unit is last in `key`.
    pub(crate) fn sample(&mut self, name: &str, key: &str, value: f64) {
        let samples = &mut self.row(name).samples;
        match samples.iter_mut().find(|(found, _)| found == key) {
            Some((_, values)) => values.push(value),
            None => samples.push((key.to_owned(), vec![value])),
        }
    }

    /// Notes something that only the JSON shows.
    pub(crate) fn note(&mut self, name: &str, key: &str, value: Value) {
        self.row(name).more.insert(key.to_owned(), value);
    }

    /// Says what a case is measured beside.
    pub(crate) fn compare(&mut self, name: &str, of: &str) {
        if self.find(of).is_some() && self.find(name).is_some() {
            self.row(name).of = Some(of.to_owned());
        }
    }

    /// What a case moved a second.
    pub(crate) fn bytes_per_second(&self, name: &str) -> Option<f64> {
        self.find(name)?.bytes_per_second()
    }

    /// Of these cases, the one with the highest rate.
    pub(crate) fn fastest<'a>(&self, names: &[&'a str]) -> Option<&'a str> {
        let rates = names.iter().filter_map(|name| Some((*name, self.bytes_per_second(name)?)));
        rates.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, _)| name)
    }

    /// Prints the table, and writes `path`.
    pub(crate) fn publish(&self, path: &Path) -> Result<()> {
        println!(
            "\n{:<58}{:>10}{:>22}{:>9}{:>8}{:>13}  of",
            "name", "seconds", "lowest-highest", "GB/s", "ratio", "95 %"
        );
        for row in &self.rows {
            let number = |value: Option<f64>, digits: usize| {
                value.map_or(String::new(), |value| format!("{value:.digits$}"))
            };
            let spread = match (row.sorted().first(), row.sorted().last()) {
                (Some(low), Some(high)) if row.seconds.len() > 1 => format!("{low:.4}-{high:.4}"),
                _ => String::new(),
            };
            let sure = self.quotients(row).and_then(|quotients| interval(&quotients));
            println!(
                "{:<58}{:>10}{:>22}{:>9}{:>8}{:>13}  {}",
                row.name,
                number(row.median(), 4),
                spread,
                number(row.bytes_per_second().map(|rate| rate / 1e9), 2),
                number(self.ratio(row), if row.ratio.is_some() { 5 } else { 3 }),
                sure.map_or(String::new(), |(low, high)| format!("{low:.3}-{high:.3}")),
                row.of.as_deref().unwrap_or_default()
            );
        }
        self.print_samples();
        let rows: Vec<Value> = self.rows.iter().map(|row| self.json(row)).collect();
        let parent = path.parent().context("the report's path has no directory")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let text = serde_json::to_string_pretty(&rows)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn json(&self, row: &Row) -> Value {
        let mut object = row.more.clone();
        let sorted = row.sorted();
        object.extend([
            ("name".to_owned(), json!(row.name)),
            ("bytes".to_owned(), json!(row.bytes)),
            ("seconds".to_owned(), json!(row.median())),
            ("lowest_seconds".to_owned(), json!(sorted.first())),
            ("highest_seconds".to_owned(), json!(sorted.last())),
            ("runs".to_owned(), json!(row.seconds.len())),
            ("bytes_per_second".to_owned(), json!(row.bytes_per_second())),
            ("ratio".to_owned(), json!(self.ratio(row))),
            ("of".to_owned(), json!(row.of)),
        ]);
        if let Some((low, high)) = self.quotients(row).and_then(|quotients| interval(&quotients)) {
            object.insert("ratio_95_percent".to_owned(), json!([low, high]));
        }
        for (key, values) in &row.samples {
            let sorted = ordered(values);
            object.insert(key.clone(), json!(middle(&sorted)));
            object.insert(format!("lowest_{key}"), json!(sorted.first()));
            object.insert(format!("highest_{key}"), json!(sorted.last()));
        }
        Value::Object(object)
    }

    /// The medians of what else was measured, case by case, without the times that nothing took.
    fn print_samples(&self) {
        let mut keys: Vec<&str> = Vec::new();
        for (key, values) in self.rows.iter().flat_map(|row| &row.samples) {
            let is_shown = !key.ends_with("_seconds") || values.iter().any(|value| *value != 0.0);
            if is_shown && !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
        for keys in keys.chunks(SAMPLES_A_TABLE) {
            println!("\n{:<46}{}", "name", keys.iter().map(|key| format!("  {key}")).collect::<String>());
            for row in &self.rows {
                let cell = |key: &&str| {
                    let (_, values) = row.samples.iter().find(|(found, _)| found == key)?;
                    let value = middle(&ordered(values))?;
                    Some(format!("{value:>.*}", if key.ends_with("_bytes") { 0 } else { 4 }))
                };
                let cells: Vec<Option<String>> = keys.iter().map(cell).collect();
                if cells.iter().any(Option::is_some) {
                    let cells = keys.iter().zip(cells);
                    let cells =
                        cells.map(|(key, cell)| format!("{:>1$}", cell.unwrap_or_default(), key.len() + 2));
                    println!("{:<46}{}", row.name, cells.collect::<String>());
                }
            }
        }
    }

    /// The median of the runs' own quotients, where both cases ran in turns: what
    /// else the host did is then in both.
    fn ratio(&self, row: &Row) -> Option<f64> {
        if row.ratio.is_some() {
            return row.ratio;
        }
        if let Some(quotients) = self.quotients(row) {
            return middle(&quotients);
        }
        let of = self.find(row.of.as_deref()?)?;
        Some((per_byte(row) / row.median()?) / (per_byte(of) / of.median()?))
    }

    /// Of each run, the lowest first; `None` where the cases did not run in turns.
    fn quotients(&self, row: &Row) -> Option<Vec<f64>> {
        let of = self.find(row.of.as_deref()?)?;
        let in_turns = row.ratio.is_none() && row.seconds.len() == of.seconds.len();
        let quotient = |(ours, its): (&f64, &f64)| (per_byte(row) / ours) / (per_byte(of) / its);
        in_turns.then(|| ordered(&row.seconds.iter().zip(&of.seconds).map(quotient).collect::<Vec<_>>()))
    }

    fn find(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    fn row(&mut self, name: &str) -> &mut Row {
        let index = self.rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
            let (name, more) = (name.to_owned(), Map::new());
            self.rows.push(Row {
                name,
                bytes: None,
                seconds: Vec::new(),
                of: None,
                ratio: None,
                samples: Vec::new(),
                more,
            });
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }
}

impl Row {
    fn sorted(&self) -> Vec<f64> {
        ordered(&self.seconds)
    }

    fn median(&self) -> Option<f64> {
        middle(&self.sorted())
    }

    fn bytes_per_second(&self) -> Option<f64> {
        Some(self.bytes? as f64 / self.median()?)
    }
}

fn per_byte(row: &Row) -> f64 {
    row.bytes.map_or(1.0, |bytes| bytes as f64)
}

/// Where the median of what the values were drawn from lies, with 95 % confidence, whatever their distribution: between
/// two of the values, as many ranks from the ends as the binomial distribution allows (its normal approximation; fewer
/// than six values tell nothing).
fn interval(sorted: &[f64]) -> Option<(f64, f64)> {
    let count = sorted.len();
    if count < 6 {
        return None;
    }
    let beyond = ((count as f64 - 1.96 * (count as f64).sqrt()) / 2.0).floor().max(1.0) as usize;
    Some((sorted[beyond - 1], sorted[count - beyond]))
}

fn ordered(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn middle(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[sorted.len() / 2 - 1], upper)
    } else {
        upper
    })
}

/// The value below which `share` of the values lie, the values in order.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}
