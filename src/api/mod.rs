//! The gRPC API: generated messages and services, our codec, our errors.

pub mod codec;
pub mod convert;
pub mod error;
pub mod grpc;

use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_reflection::server::Builder;

use pb::payment::v1::payment_service_server::{PaymentService, PaymentServiceServer};

/// Largest request, in bytes: the largest valid one (50 tags, 4 KiB of echo) is half of it.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Largest reply, in bytes: a list ends at half of it.
pub const MAX_REPLY_BYTES: usize = 1024 * 1024;

/// Our files and what they import, with their comments.
static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));

/// The payment service within its message limits.
pub fn payment_server<T: PaymentService>(payments: T) -> PaymentServiceServer<T> {
    PaymentServiceServer::new(payments)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_REPLY_BYTES)
}

/// What is served beside payments: health, and reflection in both its versions.
///
/// # Panics
/// When the descriptors that were compiled in do not parse, which every test of this would see.
pub fn routes<H: Health>(health: HealthServer<H>) -> Routes {
    let health = health.max_decoding_message_size(MAX_REQUEST_BYTES);
    let v1 = reflection().build_v1().expect("compiled-in descriptors parse");
    let v1alpha = reflection().build_v1alpha().expect("compiled-in descriptors parse");
    Routes::new(health)
        .add_service(v1.max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(v1alpha.max_decoding_message_size(MAX_REQUEST_BYTES))
}

/// google.rpc is no service of ours, but tools resolve error details through it.
fn reflection() -> Builder<'static> {
    Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // Each reflection service names itself; naming both lets either describe the other.
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
        .include_reflection_service(false)
}

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
