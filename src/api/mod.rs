//! The gRPC API: generated messages and services, our codec, our errors.

pub mod codec;
pub mod error;

/// Code generated from `proto/`. The modules nest as the packages do, because the generated code
/// refers to other packages by relative path (`super::super::common::v1`).
#[allow(clippy::all, missing_docs, rustdoc::all)]
pub mod pb {
    pub mod common {
        pub mod v1 {
            tonic::include_proto!("common.v1");
        }
    }
    pub mod payment {
        pub mod v1 {
            tonic::include_proto!("payment.v1");
        }
    }
}
