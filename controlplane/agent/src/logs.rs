//! Where `tracing` events go: stderr, as text or JSON.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

use crate::config::{LogConfig, LogFormat};

/// Begins to log. Does nothing when something in the process logs already.
pub fn init(config: &LogConfig) {
    let filter = EnvFilter::new(&config.filter);
    let builder = fmt::Subscriber::builder().with_env_filter(filter).with_writer(std::io::stderr);
    // Fails only when there is a subscriber.
    let _ = match config.format {
        LogFormat::Text => {
            let subscriber = builder.with_ansi(std::io::stderr().is_terminal()).finish();
            tracing::subscriber::set_global_default(subscriber)
        }
        LogFormat::Json => {
            let subscriber = builder.json().flatten_event(true).with_current_span(true).finish();
            tracing::subscriber::set_global_default(subscriber)
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_init_changes_nothing() {
        let config = |format| LogConfig { format, filter: "off".into() };
        init(&config(LogFormat::Text));
        init(&config(LogFormat::Json));
    }
}
