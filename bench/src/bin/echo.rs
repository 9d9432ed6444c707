//! The yardstick: the payment service's messages on tonic's own transport at its defaults, with nothing
//! behind them. Allocator, small pages, link-time optimisation, TCP_NODELAY and the layout (a single-threaded runtime
//! and a listener for each core) are the service's.
//!
//! `create=FILE get=FILE threads=CORES`: the replies, as bytes of the protocol. Prints its address.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::ExitCode,
    thread,
};

use bench::{argument, benchmark, check_arguments, on_a_runtime};
use payment_sim::{
    api::pb::payment::v1::{
        self as pb,
        payment_service_server::{PaymentService, PaymentServiceServer},
    },
    process, server,
};
use prost::Message;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

fn main() -> ExitCode {
    process::refuse_huge_pages();
    benchmark(|| run().map(|()| true))
}

fn run() -> Result<(), String> {
    check_arguments(&["create", "get", "threads"])?;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = argument("threads", cores)?;
    let echo = Echo { created: reply("create")?, found: reply("get")? };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners = server::bind(address, threads).map_err(|error| error.to_string())?;
    let bound = listeners.first().ok_or("threads: at least 1")?.local_addr();
    println!("{}", bound.map_err(|error| error.to_string())?);
    let threads: Vec<_> = listeners
        .into_iter()
        .map(|listener| {
            let echo = echo.clone();
            thread::spawn(move || on_a_runtime(serve(listener, echo)))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    Ok(())
}

/// The reply in the file that an argument names.
fn reply<T: Message + Default>(name: &str) -> Result<T, String> {
    let path: String = argument(name, String::new())?;
    if path.is_empty() {
        return Ok(T::default());
    }
    let bytes = fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
    T::decode(bytes.as_slice()).map_err(|error| format!("{path}: {error}"))
}

async fn serve(listener: TcpListener, echo: Echo) -> Result<(), String> {
    let listener =
        tokio::net::TcpListener::from_std(listener).map_err(|error| error.to_string())?;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = Server::builder().add_service(PaymentServiceServer::new(echo));
    server.serve_with_incoming(incoming).await.map_err(|error| error.to_string())
}

#[derive(Clone)]
struct Echo {
    created: pb::CreatePaymentIntentResponse,
    found: pb::GetPaymentIntentResponse,
}

type Reply<T> = Result<Response<T>, Status>;

fn not_measured<T>() -> Reply<T> {
    Err(Status::unimplemented("the yardstick knows creates and gets"))
}

#[async_trait::async_trait]
impl PaymentService for Echo {
    async fn create_payment_intent(
        &self,
        _: Request<pb::CreatePaymentIntentRequest>,
    ) -> Reply<pb::CreatePaymentIntentResponse> {
        Ok(Response::new(self.created.clone()))
    }

    async fn get_payment_intent(
        &self,
        _: Request<pb::GetPaymentIntentRequest>,
    ) -> Reply<pb::GetPaymentIntentResponse> {
        Ok(Response::new(self.found.clone()))
    }

    async fn get_payment_status(
        &self,
        _: Request<pb::GetPaymentStatusRequest>,
    ) -> Reply<pb::GetPaymentStatusResponse> {
        not_measured()
    }

    async fn process_payment(
        &self,
        _: Request<pb::ProcessPaymentRequest>,
    ) -> Reply<pb::ProcessPaymentResponse> {
        not_measured()
    }

    async fn cancel_payment(
        &self,
        _: Request<pb::CancelPaymentRequest>,
    ) -> Reply<pb::CancelPaymentResponse> {
        not_measured()
    }

    async fn list_payments(
        &self,
        _: Request<pb::ListPaymentsRequest>,
    ) -> Reply<pb::ListPaymentsResponse> {
        not_measured()
    }

    async fn simulate_webhook(
        &self,
        _: Request<pb::SimulateWebhookRequest>,
    ) -> Reply<pb::SimulateWebhookResponse> {
        not_measured()
    }
}
