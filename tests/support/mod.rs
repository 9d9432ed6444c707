//! What tests of the real binary share: the process, ports, a client, a receiver, and chance.

#![allow(dead_code, reason = "each test takes what it needs")]

pub mod chance;
pub mod process;
pub mod receiver;

use std::{future::Future, net::TcpListener, time::Duration};

use payment_sim::{
    api::pb::{
        payment::v1::payment_service_client::PaymentServiceClient,
        simulation::v1::simulation_service_client::SimulationServiceClient,
    },
    clock::Stopwatch,
};
use tonic::transport::{Channel, Endpoint};

pub type Client = PaymentServiceClient<Channel>;

/// A client whose connection is made when it is needed, and again after the service was away.
pub fn client(port: u16) -> Client {
    PaymentServiceClient::new(channel(port))
}

/// The same for the simulation API.
pub fn simulation(port: u16) -> SimulationServiceClient<Channel> {
    SimulationServiceClient::new(channel(port))
}

fn channel(port: u16) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("a URL");
    endpoint.connect_timeout(Duration::from_secs(2)).connect_lazy()
}

/// Free ports, from below the range that the kernel takes for outgoing connections: nobody else gets
/// them while the service is down.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let mut chance = chance::Chance::of_the_machine();
    let mut found: Vec<(u16, TcpListener)> = Vec::new();
    while found.len() < N {
        let port = 12_000 + u16::try_from(chance.below(18_000)).expect("small");
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            found.push((port, listener));
        }
    }
    std::array::from_fn(|i| found[i].0)
}

/// Asks until it is so; false when it is not so in time.
pub async fn until<F: Future<Output = bool>>(
    within: Duration,
    mut is_so: impl FnMut() -> F,
) -> bool {
    let watch = Stopwatch::start();
    while !is_so().await {
        if watch.elapsed() > within {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    true
}

/// A test's own settings; nothing of the service's.
#[expect(
    clippy::disallowed_methods,
    reason = "CRASH_SEED and its like are no settings of the service"
)]
pub fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
