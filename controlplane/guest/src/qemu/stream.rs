//! The unix socket that carries QEMU's device state.

use std::path::Path;

use serde_json::json;

use crate::GuestError;
use crate::qmp::{QmpClient, QmpError};

use super::replies::YankInstance;

/// Longest path in a `sockaddr_un`, without the final zero.
const PATH_LIMIT_BYTES: usize = 107;

/// QEMU's word for its migration among what can be yanked.
const MIGRATION: &str = "migration";

/// The stream's name for QEMU.
pub(super) fn uri(stream: &Path) -> Result<String, GuestError> {
    match stream.to_str() {
        Some(path) if !path.is_empty() && path.len() <= PATH_LIMIT_BYTES => Ok(format!("unix:{path}")),
        _ => Err(GuestError::StreamPath { path: stream.to_owned() }),
    }
}

/// Shuts QEMU's end of the stream down, also while QEMU hangs in it: its reads
/// and writes fail from then on.
pub(super) async fn cut(client: &QmpClient) -> Result<(), QmpError> {
    client.run_out_of_band("yank", json!({ "instances": [{ "type": MIGRATION }] })).await
}

/// Whether QEMU still holds on to a migration. It does for a moment after the
/// migration has ended by its own account; a new one then ends QEMU.
pub(super) async fn is_held(client: &QmpClient) -> Result<bool, QmpError> {
    match client.execute::<Vec<YankInstance>>("query-yank", json!({})).await {
        Ok(instances) => Ok(instances.iter().any(|instance| instance.kind == MIGRATION)),
        Err(error) if error.is_class("CommandNotFound") => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_named_by_a_path_that_fits_a_socket_address() {
        assert_eq!(uri(Path::new("/run/a b,c")).unwrap(), "unix:/run/a b,c");
        let longest = format!("/{}", "x".repeat(106));
        assert!(uri(Path::new(&longest)).is_ok());
        assert!(uri(Path::new(&format!("{longest}x"))).is_err());
        assert!(uri(Path::new("")).is_err());
    }
}
