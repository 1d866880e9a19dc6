//! Protocol `ramferry.v1`: messages, clients and services, generated from the
//! `.proto` files beside this crate. No logic.

/// Everything of package `ramferry.v1`; documented in the `.proto` files.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("ramferry.v1");

    /// The files' descriptors, as gRPC reflection serves them.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
