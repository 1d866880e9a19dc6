//! Progress on stderr while a migration is followed: a bar on a terminal, else
//! a line a second, or nothing.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ramferry_proto::v1::{Migration, MigrationState};

use crate::follow::Observer;
use crate::output::report::{error, expected_downtime};
use crate::output::summary::state_name;
use crate::output::{bit_rate, bytes, printable};

/// Updates a second that a person at a terminal can follow.
const BAR_INTERVAL: Duration = Duration::from_millis(200);
/// Between two lines in a log.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Progress on stderr.
pub(crate) enum Progress {
    /// On a terminal.
    Bar(Bar),
    /// In a log.
    Lines(Lines),
    /// Nothing.
    Quiet,
}

impl Progress {
    /// What suits stderr.
    pub(crate) fn new(is_quiet: bool) -> Self {
        match (is_quiet, io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Bar(Bar::new(ProgressDrawTarget::stderr())),
            (false, false) => Self::Lines(Lines::default()),
        }
    }

    /// How often the agent is to be heard.
    pub(crate) fn interval(&self) -> Duration {
        match self {
            Self::Bar(_) => BAR_INTERVAL,
            Self::Lines(_) | Self::Quiet => LINE_INTERVAL,
        }
    }

    /// Leaves the terminal as it was.
    pub(crate) fn finish(&mut self) {
        if let Self::Bar(bar) = self {
            bar.bar.finish_and_clear();
        }
    }
}

impl Observer for Progress {
    fn update(&mut self, migration: &Migration) {
        match self {
            Self::Bar(bar) => bar.update(migration),
            Self::Lines(lines) => {
                if lines.is_due(migration, Instant::now()) {
                    write_line(&line(migration));
                }
            }
            Self::Quiet => {}
        }
    }

    fn note(&mut self, text: &str) {
        match self {
            Self::Bar(bar) => bar.bar.suspend(|| write_line(text)),
            Self::Lines(_) => write_line(text),
            Self::Quiet => {}
        }
    }
}

/// The round under way, as a bar.
pub(crate) struct Bar {
    bar: ProgressBar,
    round: u32,
}

impl Bar {
    fn new(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let style = ProgressStyle::with_template("{prefix:>14} [{bar:16}] {wide_msg}")
            .expect("the template is a constant")
            .progress_chars("=> ");
        bar.set_style(style);
        Self { bar, round: 0 }
    }

    fn update(&mut self, migration: &Migration) {
        let progress = migration.progress.clone().unwrap_or_default();
        if progress.round != self.round {
            self.round = progress.round;
            self.bar.set_length(1);
        }
        // The round's size is the most that was seen to remain; the first one's is known before it.
        let known = if progress.round <= 1 { progress.present_bytes } else { 0 };
        let seen = self.bar.length().unwrap_or(1);
        let length = seen.max(known).max(progress.remaining_bytes);
        self.bar.set_length(length);
        let copied =
            if has_copied(migration.state()) { length.saturating_sub(progress.remaining_bytes) } else { 0 };
        self.bar.set_position(copied);
        self.bar.set_prefix(state_name(migration.state()));
        self.bar.set_message(printable(&measures(migration)));
        self.bar.tick();
    }
}

fn has_copied(state: MigrationState) -> bool {
    !matches!(state, MigrationState::Unspecified | MigrationState::Pending | MigrationState::Preparing)
}

/// When the next line is due: at each change of state, else once a second.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    last: Option<(Instant, i32)>,
}

impl Lines {
    fn is_due(&mut self, migration: &Migration, now: Instant) -> bool {
        // The agent's second and ours are not quite the same.
        let gap = LINE_INTERVAL.mul_f32(0.9);
        if let Some((at, state)) = self.last
            && state == migration.state
            && now.duration_since(at) < gap
        {
            return false;
        }
        self.last = Some((now, migration.state));
        true
    }
}

fn line(migration: &Migration) -> String {
    let state = state_name(migration.state());
    let end = error(migration);
    match migration.state() {
        MigrationState::Succeeded => format!("{}: {state}", migration.id),
        _ if end.is_empty() => format!("{}: {state}, {}", migration.id, measures(migration)),
        _ => format!("{}: {state}, {end}", migration.id),
    }
}

fn measures(migration: &Migration) -> String {
    let progress = migration.progress.clone().unwrap_or_default();
    if migration.state() == MigrationState::Postcopy {
        let owed =
            format!("the guest runs at the destination, {} still owed", bytes(progress.remaining_bytes));
        return if migration.trouble.is_empty() { owed } else { format!("{owed}; {}", migration.trouble) };
    }
    let mut text = format!(
        "round {}, {} remaining, dirty {}/s, {}",
        progress.round,
        bytes(progress.remaining_bytes),
        bytes(progress.dirty_rate_bytes_per_second),
        bit_rate(progress.throughput_bits_per_second),
    );
    if progress.throttle_percent > 0 {
        text.push_str(&format!(", guest throttled by {} %", progress.throttle_percent));
    }
    let expected = expected_downtime(&progress);
    if !expected.is_empty() {
        text.push_str(", ");
        text.push_str(&expected);
    }
    if !migration.trouble.is_empty() {
        text.push_str("; ");
        text.push_str(&migration.trouble);
    }
    text
}

/// Nothing is left to do when stderr is gone.
pub(crate) fn write_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", printable(text));
}

#[cfg(test)]
mod tests {
    use ramferry_proto::v1::MigrationProgress;

    use super::*;

    fn migration(state: MigrationState, round: u32, remaining_bytes: u64) -> Migration {
        let progress = MigrationProgress {
            round,
            remaining_bytes,
            present_bytes: 1000,
            dirty_rate_bytes_per_second: 3 << 20,
            throughput_bits_per_second: 38_100_000_000,
            expected_downtime: Some(prost_types::Duration { seconds: 0, nanos: 12_000_000 }),
            ..Default::default()
        };
        Migration { id: "vm-1".into(), state: state.into(), progress: Some(progress), ..Default::default() }
    }

    #[test]
    fn line_names_state_round_and_rates() {
        assert_eq!(
            line(&migration(MigrationState::Precopy, 2, 2 << 20)),
            "vm-1: PRECOPY, round 2, 2.00 MiB remaining, dirty 3.00 MiB/s, 38.1 Gbit/s, ~12.0 ms downtime"
        );
        assert_eq!(line(&migration(MigrationState::Succeeded, 2, 0)), "vm-1: SUCCEEDED");
        let mut throttled = migration(MigrationState::Precopy, 2, 0);
        throttled.progress.get_or_insert_default().throttle_percent = 30;
        assert!(line(&throttled).contains(", guest throttled by 30 %, ~12.0 ms"), "{}", line(&throttled));
    }

    #[test]
    fn lines_come_once_a_second_and_at_each_change_of_state() {
        let mut lines = Lines::default();
        let start = Instant::now();
        let mut is_due =
            |state, millis| lines.is_due(&migration(state, 1, 0), start + Duration::from_millis(millis));
        assert!(is_due(MigrationState::Precopy, 0));
        assert!(!is_due(MigrationState::Precopy, 500));
        assert!(is_due(MigrationState::Precopy, 990));
        assert!(is_due(MigrationState::SwitchingOver, 1000));
    }

    #[test]
    fn bar_measures_each_round_by_the_most_that_remained() {
        let mut bar = Bar::new(ProgressDrawTarget::hidden());
        bar.update(&migration(MigrationState::Preparing, 0, 0));
        assert_eq!(bar.bar.position(), 0);
        bar.update(&migration(MigrationState::Precopy, 1, 400));
        assert_eq!((bar.bar.position(), bar.bar.length()), (600, Some(1000)));
        bar.update(&migration(MigrationState::Precopy, 2, 80));
        bar.update(&migration(MigrationState::Precopy, 2, 20));
        assert_eq!((bar.bar.position(), bar.bar.length()), (60, Some(80)));
    }
}
