//! `simulation.v1.SimulationService`: deliveries are listed, and sent again on order.

use std::sync::Arc;

use prost::Message;
use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status};

use super::{
    convert,
    cursor::{self, Filters},
    error::Failure,
    grpc::{PAGE_BYTES, failure, page_size},
    pb::simulation::v1::{
        self as pb, redeliver_request::Which, simulation_service_server::SimulationService,
    },
};
use crate::{
    app::App,
    domain::{
        deliveries::{DeliveryFilter, DeliveryId, Standing},
        delivery::Channel,
        ids::PaymentId,
        origin::Origin,
        validation::{Violation, Violations},
    },
    store::{DeliveryPage, DeliveryQuery, Found, Reached},
};

/// The service, to be cloned into every connection.
#[derive(Clone)]
pub struct Simulation(Arc<App>);

impl Simulation {
    pub const fn new(app: Arc<App>) -> Self {
        Self(app)
    }
}

#[tonic::async_trait]
impl SimulationService for Simulation {
    async fn list_deliveries(
        &self,
        request: Request<pb::ListDeliveriesRequest>,
    ) -> Result<Response<pb::ListDeliveriesResponse>, Status> {
        let (query, filters) = listing(request.into_inner()).map_err(Failure::invalid)?;
        let page = self.0.deliveries(query).await.map_err(failure)?;
        Ok(Response::new(reply(page, filters)))
    }

    async fn redeliver(
        &self,
        request: Request<pb::RedeliverRequest>,
    ) -> Result<Response<pb::RedeliverResponse>, Status> {
        let reply = match order(request.into_inner()).map_err(Failure::invalid)? {
            Order::One(id) => {
                self.0.redeliver(id).await.map_err(failure)?;
                pb::RedeliverResponse { ordered: 1, next_cursor: String::new() }
            }
            Order::Dead { filter, filters, beyond } => {
                let done = self.0.redeliver_dead(filter, beyond).await.map_err(failure)?;
                pb::RedeliverResponse {
                    ordered: i32::try_from(done.ordered).unwrap_or(i32::MAX),
                    next_cursor: next_cursor(filters, done.more_beyond),
                }
            }
        };
        Ok(Response::new(reply))
    }
}

/// Where a page ends, and which list it belongs to.
#[derive(Serialize, Deserialize)]
struct Cursor {
    filters: Filters,
    beyond: Reached,
}

fn next_cursor(filters: Filters, more_beyond: Option<Reached>) -> String {
    more_beyond.map(|beyond| cursor::write(&Cursor { filters, beyond })).unwrap_or_default()
}

fn beyond(text: &str, filters: Filters, found: &mut Violations) -> Option<Reached> {
    if text.is_empty() {
        return None;
    }
    match cursor::read::<Cursor>(text) {
        Some(cursor) if cursor.filters == filters => return Some(cursor.beyond),
        Some(_) => found.add("cursor", "belongs to another filter"),
        None => found.add("cursor", "is no cursor of ours"),
    }
    None
}

fn listing(message: pb::ListDeliveriesRequest) -> Result<(DeliveryQuery, Filters), Vec<Violation>> {
    let mut found = Violations::default();
    let asked = message.filter.unwrap_or_default();
    let filters = cursor::filters("deliveries", &asked);
    let query = DeliveryQuery {
        filter: filter(&asked, &Standing::ALL, &mut found),
        beyond: beyond(&message.cursor, filters, &mut found),
        limit: page_size("page_size", message.page_size, &mut found) as usize,
    };
    found.into_result()?;
    Ok((query, filters))
}

enum Order {
    One(DeliveryId),
    Dead { filter: DeliveryFilter, filters: Filters, beyond: Option<Reached> },
}

fn order(message: pb::RedeliverRequest) -> Result<Order, Vec<Violation>> {
    let mut found = Violations::default();
    let order = match message.which {
        Some(Which::DeliveryId(text)) => {
            if !message.cursor.is_empty() {
                found.add("cursor", "goes with a filter only");
            }
            let id = DeliveryId::parse(&text);
            if id.is_none() {
                found.add("delivery_id", "must be dlv_…, as ListDeliveries names it");
            }
            id.map(Order::One)
        }
        Some(Which::Filter(asked)) => {
            let filters = cursor::filters("dead", &asked);
            let filter = filter(&asked, &[Standing::Dead], &mut found);
            Some(Order::Dead {
                filter,
                filters,
                beyond: beyond(&message.cursor, filters, &mut found),
            })
        }
        None => {
            found.add("delivery_id", "is required, or else filter");
            None
        }
    };
    found.into_result()?;
    Ok(order.expect("what is missing has left a violation"))
}

/// `standings` are those that the call is about.
fn filter(
    asked: &pb::DeliveryFilter,
    standings: &[Standing],
    found: &mut Violations,
) -> DeliveryFilter {
    let names: Vec<_> = standings.iter().map(|one| one.as_str()).collect();
    let allowed = format!("must be empty or one of {}", names.join(", "));
    let standing = |text: &str| Standing::parse(text).filter(|one| standings.contains(one));
    let standing = named("filter.state", &asked.state, standing, &allowed, found);
    let channels = Channel::ALL.map(Channel::as_str);
    let allowed = format!("must be empty or one of {}", channels.join(", "));
    let channel = named("filter.channel", &asked.channel, Channel::parse, &allowed, found);
    let allowed = "must be pi_ or pay_ and the payment's 26 characters";
    let id = &asked.payment_intent_id;
    let payment = named("filter.payment_intent_id", id, PaymentId::parse, allowed, found);
    let allowed = "must be http:// or https://, a host, and a port if need be";
    let origin = named("filter.origin", &asked.origin, Origin::parse, allowed, found);
    DeliveryFilter { standing, channel, payment, origin }
}

/// What a field names; `None` where it is empty, or where `found` has grown.
fn named<T>(
    field: &str,
    text: &str,
    parse: impl Fn(&str) -> Option<T>,
    allowed: &str,
    found: &mut Violations,
) -> Option<T> {
    if text.is_empty() {
        return None;
    }
    let value = parse(text);
    if value.is_none() {
        found.add(field, allowed);
    }
    value
}

/// As many deliveries as fit.
fn reply(page: DeliveryPage, filters: Filters) -> pb::ListDeliveriesResponse {
    let mut bytes = 0;
    let mut deliveries = Vec::with_capacity(page.found.len());
    let mut more_beyond = page.more_beyond;
    let mut last = None;
    for found in &page.found {
        let Some(delivery) = listed(found) else { continue };
        bytes += delivery.encoded_len();
        if bytes > PAGE_BYTES && last.is_some() {
            more_beyond = last;
            break;
        }
        last = Some(Reached { payment: found.payment.terms.id, delivery: Some(found.no) });
        deliveries.push(delivery);
    }
    pb::ListDeliveriesResponse { deliveries, next_cursor: next_cursor(filters, more_beyond) }
}

fn listed(found: &Found) -> Option<pb::ListedDelivery> {
    let payment = &found.payment;
    let listed = payment.deliveries().find(|one| one.no() == found.no)?;
    Some(pb::ListedDelivery {
        payment_intent_id: payment.terms.id.intent(),
        delivery: Some(convert::delivery(payment, &listed)),
    })
}
