//! What the operator has ordered of `reservation-worker`.

use std::net::IpAddr;
use std::time::Duration;

use url::Url;

use super::settings::Binary;
use super::value::{ApiStyle, LogLevel, Stage, StoreUrl};
use super::{AwsConfig, BinaryConfig, Resolved};

/// Every setting of the worker, checked.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    pub stage: Stage,
    pub port: u16,
    pub bind_address: IpAddr,
    pub log_level: LogLevel,
    pub queue_url: Url,
    /// `None`: a log line takes the call's place.
    pub api: Option<ReservationApiConfig>,
    pub retry_for: Duration,
    pub concurrency: usize,
    pub visibility: Duration,
    pub state: StoreUrl,
    pub aws: AwsConfig,
}

#[derive(Debug, Clone)]
pub struct ReservationApiConfig {
    pub url: Url,
    pub style: ApiStyle,
    pub timeout: Duration,
}

impl BinaryConfig for WorkerConfig {
    const BINARY: Binary = Binary::ReservationWorker;

    fn logs(&self) -> (Stage, LogLevel) {
        (self.stage, self.log_level)
    }

    fn new(given: &Resolved) -> Self {
        let url: Option<Url> = given.take("RESERVATION_API_URL");
        Self {
            stage: given.take("ENVIRONMENT"),
            port: given.take("WORKER_PORT"),
            bind_address: given.take("BIND_ADDRESS"),
            log_level: given.take("LOG_LEVEL"),
            queue_url: given.take("PAYMENT_WEBHOOK_QUEUE_URL"),
            api: url.map(|url| ReservationApiConfig {
                url,
                style: given.take("RESERVATION_API_STYLE"),
                timeout: given.take("RESERVATION_API_TIMEOUT_MS"),
            }),
            retry_for: given.take("WORKER_RETRY_FOR"),
            concurrency: given.take("WORKER_CONCURRENCY"),
            visibility: given.take("WORKER_VISIBILITY"),
            state: given.take("WORKER_STATE"),
            aws: AwsConfig::new(given),
        }
    }
}
