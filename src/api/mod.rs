//! The gRPC API: generated messages and services, our codec, our errors.

pub mod codec;
pub mod convert;
mod cursor;
pub mod error;
pub mod grpc;
pub mod simulation;
pub mod token;
pub mod unary;

use tonic::service::{Routes, interceptor::InterceptedService};
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_reflection::server::Builder;

use pb::simulation::v1::simulation_service_server::SimulationServiceServer;
use simulation::Simulation;
use token::Guard;

/// Largest request, in bytes: the largest valid one (50 tags, 4 KiB of echo) is half of it.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Largest reply, in bytes: a list ends at half of it.
pub const MAX_REPLY_BYTES: usize = 1024 * 1024;

/// Our files and what they import, with their comments.
static DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/payment_sim_descriptor.bin"));

/// The simulation service within its message limits, behind its guard.
pub type SimulationServer = InterceptedService<SimulationServiceServer<Simulation>, Guard>;

pub fn simulation_server(simulation: Simulation, guard: Guard) -> SimulationServer {
    let server = SimulationServiceServer::new(simulation)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_REPLY_BYTES);
    InterceptedService::new(server, guard)
}

/// What is served beside payments: health, reflection in both its versions, and the simulation service
/// where it is on; elsewhere its calls are unknown.
///
/// # Panics
/// When the descriptors that were compiled in do not parse, which every test of this would see.
pub fn routes<H: Health>(health: HealthServer<H>, simulation: Option<SimulationServer>) -> Routes {
    let health = health.max_decoding_message_size(MAX_REQUEST_BYTES);
    let v1 = reflection().build_v1().expect("compiled-in descriptors parse");
    let v1alpha = reflection().build_v1alpha().expect("compiled-in descriptors parse");
    let routes = Routes::new(health)
        .add_service(v1.max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(v1alpha.max_decoding_message_size(MAX_REQUEST_BYTES));
    match simulation {
        Some(simulation) => routes.add_service(simulation),
        None => routes,
    }
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
    pub mod simulation {
        pub mod v1 {
            tonic::include_proto!("simulation.v1");
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use tokio_util::sync::CancellationToken;
    use tonic_reflection::pb::{v1, v1alpha};

    use super::DESCRIPTORS;
    use crate::edge::EdgeLimits;
    use crate::edge::testbed::edge;

    /// Every message, enum and service that callers may want described.
    fn symbols() -> Vec<String> {
        let sets = [
            DESCRIPTORS,
            tonic_types::pb::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            v1::FILE_DESCRIPTOR_SET,
            v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let files = sets.iter().flat_map(|set| FileDescriptorSet::decode(*set).unwrap().file);
        let names = files.flat_map(|file| {
            let messages = file.message_type.iter().map(|m| m.name().to_owned());
            let enums = file.enum_type.iter().map(|e| e.name().to_owned());
            let services = file.service.iter().map(|s| s.name().to_owned());
            let names: Vec<_> = messages.chain(enums).chain(services).collect();
            names.into_iter().map(move |name| format!("{}.{name}", file.package()))
        });
        names.collect()
    }

    fn frame(message: &impl Message) -> Vec<u8> {
        let bytes = message.encode_to_vec();
        let length = u32::try_from(bytes.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), &bytes].concat()
    }

    /// Sends a whole reflection stream and returns its replies.
    async fn reflect<R: Message + Default>(version: &str, requests: Vec<u8>) -> Vec<R> {
        let (edge, _) = edge(EdgeLimits::default());
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let request = http::Request::post(path)
            .header("content-type", "application/grpc")
            .body(Full::new(bytes::Bytes::from(requests)))
            .unwrap();
        let service = edge.connection(CancellationToken::new());
        let response = hyper::service::Service::call(&service, request).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let (mut rest, mut replies) = (&body[..], Vec::new());
        while let Some((head, tail)) = rest.split_at_checked(5) {
            let length = u32::from_be_bytes(head[1..].try_into().unwrap());
            let (message, next) = tail.split_at(length as usize);
            replies.push(R::decode(message).unwrap());
            rest = next;
        }
        replies
    }

    #[tokio::test]
    async fn reflection_v1_resolves_every_symbol() {
        use v1::server_reflection_request::MessageRequest;
        use v1::server_reflection_response::MessageResponse;
        let ask = |wanted| v1::ServerReflectionRequest {
            message_request: Some(MessageRequest::FileContainingSymbol(wanted)),
            ..Default::default()
        };
        let symbols = symbols();
        assert!(symbols.contains(&"google.rpc.BadRequest".to_owned()));
        let requests = symbols.iter().flat_map(|s| frame(&ask(s.clone()))).collect();
        let replies: Vec<v1::ServerReflectionResponse> = reflect("v1", requests).await;
        assert_eq!(replies.len(), symbols.len());
        for (symbol, reply) in symbols.iter().zip(replies) {
            let file =
                matches!(reply.message_response, Some(MessageResponse::FileDescriptorResponse(_)));
            assert!(file, "{symbol}");
        }
    }

    #[tokio::test]
    async fn reflection_v1alpha_resolves_every_symbol() {
        use v1alpha::server_reflection_request::MessageRequest;
        use v1alpha::server_reflection_response::MessageResponse;
        let ask = |wanted| v1alpha::ServerReflectionRequest {
            message_request: Some(MessageRequest::FileContainingSymbol(wanted)),
            ..Default::default()
        };
        let symbols = symbols();
        let requests = symbols.iter().flat_map(|s| frame(&ask(s.clone()))).collect();
        let replies: Vec<v1alpha::ServerReflectionResponse> = reflect("v1alpha", requests).await;
        assert_eq!(replies.len(), symbols.len());
        for (symbol, reply) in symbols.iter().zip(replies) {
            let file =
                matches!(reply.message_response, Some(MessageResponse::FileDescriptorResponse(_)));
            assert!(file, "{symbol}");
        }
    }
}
