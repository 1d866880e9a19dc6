//! What QMP commands return, as far as it is used.

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(super) struct StatusInfo {
    pub(super) running: bool,
    pub(super) status: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct MigrateInfo {
    pub(super) status: Option<String>,
    pub(super) error_desc: Option<String>,
    #[serde(default)]
    pub(super) blocked_reasons: Vec<String>,
    /// Where an incoming migration is listened for.
    #[serde(default)]
    socket_address: Vec<serde::de::IgnoredAny>,
}

impl MigrateInfo {
    /// Whether a destination listens for its migration, or has gone further.
    pub(super) fn incoming_started(&self) -> bool {
        !self.socket_address.is_empty() || self.status.as_deref().is_some_and(|status| status != "none")
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Memdev {
    pub(super) id: Option<String>,
    pub(super) share: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct Capability {
    pub(super) capability: String,
    pub(super) state: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Parameters {
    pub(super) max_bandwidth: Option<u64>,
    #[serde(default)]
    pub(super) tls_creds: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockNode {
    pub(super) node_name: Option<String>,
    pub(super) drv: String,
    /// Its name, for what is in a file.
    #[serde(default)]
    pub(super) file: String,
    pub(super) cache: CacheInfo,
}

#[derive(Debug, Deserialize)]
pub(super) struct CacheInfo {
    pub(super) direct: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct CpuInfo {
    #[serde(rename = "thread-id")]
    pub(super) thread: u32,
}

#[derive(Debug, Deserialize)]
pub(super) struct NameInfo {
    pub(super) name: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ObjectProperty {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct BalloonInfo {
    pub(super) actual: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct HumanReadable {
    pub(super) human_readable_text: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct YankInstance {
    #[serde(rename = "type")]
    pub(super) kind: String,
}
