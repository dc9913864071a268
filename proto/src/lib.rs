//! The contract between agents and callers, as Rust types.
//!
//! Purpose: everything under `vmsnap/v1/*.proto`, compiled at build time, and
//! the descriptors that server reflection answers with. Nothing is written by
//! hand here, so that the `.proto` files stay the only truth.

/// Version 1 of the contract.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("vmsnap.v1");
}

/// The encoded `FileDescriptorSet` of the contract, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The domain of every `google.rpc.ErrorInfo` that an agent sends.
pub const ERROR_DOMAIN: &str = "vmsnap";
