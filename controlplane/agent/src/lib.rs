//! The daemon of one host: gRPC services, sessions, journal, metrics.

pub use self::core::CoreError;
pub use config::{Config, ConfigError, Options};
pub use role::MigrationRole;
pub use run::{AgentError, run, run_until};
pub use server::Bound;

pub mod auth;
pub mod config;
mod core;
mod destination;
mod device_stream;
pub mod diagnostics;
mod fabrics;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod guest_cell;
mod inspect;
pub mod journal;
mod keepsake;
pub mod logs;
pub mod metrics;
mod migration_service;
mod migrations;
mod node_service;
mod peer_service;
mod probes;
mod publish;
mod request;
pub mod role;
mod run;
pub mod server;
mod sockets;
mod source;
pub mod status;
mod step_gate;
mod summary;
pub mod throttle;
