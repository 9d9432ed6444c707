//! HTTP/1.1 and the two AWS JSON protocols; where faults on order take effect.

use std::{io, net::TcpStream, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, Response, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use socket2::SockRef;
use std::time::Duration;
use tokio::{net::TcpListener, task::JoinSet};

use super::{Call, Entry, Fate, Fault, Options, Shared, sqs::Receive};

const NOT_FOUND: u16 = 404;
const BAD_REQUEST: u16 = 400;
const FORBIDDEN: u16 = 403;

/// A request, read as far as it is the same for all operations.
pub(super) struct Asked {
    service: Service,
    pub(super) operation: String,
    body: Bytes,
    entries: Vec<Box<RawValue>>,
    pub(super) queue_url: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Events,
    Sqs,
}

/// What an operation that succeeded says, and what became of its entries.
pub(super) struct Reply {
    pub(super) body: Value,
    pub(super) entries: Vec<Entry>,
}

/// Why an operation or an entry is refused.
#[derive(Debug)]
pub(super) struct Refusal {
    status: u16,
    pub(super) code: String,
    pub(super) why: String,
}

impl Refusal {
    pub(super) fn new(code: &str, why: String) -> Self {
        Self { status: BAD_REQUEST, code: code.to_owned(), why }
    }

    pub(super) fn bad_value(why: &str) -> Self {
        Self::new("InvalidParameterValue", format!("One or more parameters are invalid. {why}"))
    }

    pub(super) fn unknown_operation(operation: &str) -> Self {
        let why = format!("The fake knows no operation \"{operation}\".");
        Self { status: NOT_FOUND, ..Self::new("UnknownOperationException", why) }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Common {
    #[serde(default)]
    entries: Vec<Box<RawValue>>,
    #[serde(default)]
    queue_url: String,
}

impl Asked {
    fn read(headers: &HeaderMap, body: Bytes) -> Result<Self, Refusal> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let target = header("x-amz-target").unwrap_or_default();
        let (prefix, operation) = target.split_once('.').unwrap_or_default();
        let (service, scope) = match prefix {
            "AWSEvents" => (Service::Events, "/events/aws4_request"),
            "AmazonSQS" => (Service::Sqs, "/sqs/aws4_request"),
            _ => return Err(Refusal::unknown_operation(target)),
        };
        // The signature itself is the SDK's affair; that there is one, for this service, is ours.
        if !header("authorization").is_some_and(|signed| signed.contains(scope)) {
            let why = format!("The request is not signed for {scope}.");
            let refusal = Refusal::new("MissingAuthenticationTokenException", why);
            return Err(Refusal { status: FORBIDDEN, ..refusal });
        }
        let common: Common = serde_json::from_slice(&body).map_err(malformed)?;
        Ok(Self {
            service,
            operation: operation.to_owned(),
            body,
            entries: common.entries,
            queue_url: common.queue_url,
        })
    }

    pub(super) fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, Refusal> {
        serde_json::from_slice(&self.body).map_err(malformed)
    }

    pub(super) fn parse_entries<'a, T: Deserialize<'a>>(&'a self) -> Result<Vec<T>, Refusal> {
        self.entries().map(|raw| serde_json::from_str(raw).map_err(malformed)).collect()
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.get())
    }
}

fn malformed(error: serde_json::Error) -> Refusal {
    Refusal::new("SerializationException", error.to_string())
}

/// Ends when it is dropped, with all its connections.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        // Those that ended are let go of.
        while connections.try_join_next().is_some() {}
        connections.spawn(serve_connection(stream, Arc::clone(&shared)));
    }
}

async fn serve_connection(stream: tokio::net::TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    // A second handle on the socket, for what hyper would never do to it.
    let stream = stream.into_std()?;
    let socket = Arc::new(stream.try_clone()?);
    let stream = tokio::net::TcpStream::from_std(stream)?;
    let mut is_reachable = shared.is_reachable.subscribe();
    let service = service_fn({
        let socket = Arc::clone(&socket);
        move |request| answer(Arc::clone(&shared), Arc::clone(&socket), request)
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // A connection that breaks is its client's to notice.
        _ = connection => {}
        _ = is_reachable.wait_for(|reachable| !reachable) => reset(&socket)?,
    }
    Ok(())
}

/// The socket's close, which follows, sends a reset.
fn reset(socket: &TcpStream) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

async fn answer(
    shared: Arc<Shared>,
    socket: Arc<TcpStream>,
    request: Request<Incoming>,
) -> io::Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let asked = match Asked::read(&head.headers, body) {
        Ok(asked) => asked,
        Err(refusal) => return Ok(refused(Service::Events, &refusal)),
    };
    let entries: Vec<&str> = asked.entries().collect();
    let fault = shared.lock().faults.next(&asked.operation, &entries);
    match &fault {
        Some(Fault::CutBefore) => {
            shared.note(&asked, fault.clone(), Vec::new());
            reset(&socket)?;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Some(Fault::Refuse { status, code }) => {
            shared.note(&asked, fault.clone(), Vec::new());
            let refusal = Refusal::new(code, "on order".to_owned());
            return Ok(refused(asked.service, &Refusal { status: *status, ..refusal }));
        }
        _ => {}
    }
    let reply = match shared.apply(&asked, fault.as_ref()).await {
        Ok(body) => response(asked.service, 200, body.to_string().into()),
        Err(refusal) => refused(asked.service, &refusal),
    };
    match fault {
        Some(Fault::CutAfter) => {
            reset(&socket)?;
            Err(io::ErrorKind::ConnectionReset.into())
        }
        Some(Fault::Garble { status, body }) => Ok(response(asked.service, status, body)),
        Some(Fault::AnswerTwice) => answer_twice(&socket, reply).await,
        Some(Fault::Hold) => {
            shared.hold().await;
            Ok(reply)
        }
        _ => Ok(reply),
    }
}

impl Shared {
    /// Does what is asked, and notes it in the same breath: calls stand in the order of their effects.
    async fn apply(&self, asked: &Asked, fault: Option<&Fault>) -> Result<Value, Refusal> {
        if asked.operation == "ReceiveMessage" {
            return self.receive(asked, fault).await;
        }
        let mut state = self.lock();
        let state = &mut *state;
        let now_ms = self.options.clock.now_ms();
        let done = match (asked.service, asked.operation.as_str()) {
            (Service::Events, "PutEvents") => {
                state.events.put(asked, fault, &mut state.queues, now_ms)
            }
            (Service::Events, _) => {
                let body = state.events.answer(asked);
                body.map(|body| Reply { body, entries: Vec::new() })
            }
            (Service::Sqs, _) => state.queues.answer(asked, fault, now_ms),
        };
        let (entries, reply) = match done {
            Ok(Reply { body, entries }) => (entries, Ok(body)),
            Err(refusal) => (Vec::new(), Err(refusal)),
        };
        self.keep(&mut state.calls, || asked.call(fault.cloned(), entries));
        self.arrived.notify_waiters();
        reply
    }

    fn note(&self, asked: &Asked, fault: Option<Fault>, entries: Vec<Entry>) {
        self.keep(&mut self.lock().calls, || asked.call(fault, entries));
    }

    fn keep(&self, calls: &mut Vec<Call>, call: impl FnOnce() -> Call) {
        let Options { keeps_calls, on_call, .. } = &self.options;
        if !keeps_calls && on_call.is_none() {
            return;
        }
        let call = call();
        if let Some(on_call) = on_call {
            on_call(&call);
        }
        if *keeps_calls {
            calls.push(call);
        }
    }

    /// Waits for messages as long as the caller does.
    async fn receive(&self, asked: &Asked, fault: Option<&Fault>) -> Result<Value, Refusal> {
        let wanted = self.lock().queues.receiving(asked);
        let reply = match wanted {
            Ok(wanted) => self.receive_until_there_is_something(&wanted).await,
            Err(refusal) => Err(refusal),
        };
        self.note(asked, fault.cloned(), Vec::new());
        reply
    }

    async fn receive_until_there_is_something(&self, wanted: &Receive) -> Result<Value, Refusal> {
        let clock = &self.options.clock;
        let end_ms = clock.now_ms() + i64::from(wanted.wait_s) * 1000;
        loop {
            // Listening starts before the look, so that what arrives in between is not missed.
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            let now_ms = clock.now_ms();
            let (body, next_ms) = self.lock().queues.receive(wanted, now_ms)?;
            if body.get("Messages").is_some() || now_ms >= end_ms {
                return Ok(body);
            }
            let wake_ms = next_ms.map_or(end_ms, |next_ms| next_ms.min(end_ms));
            tokio::select! {
                () = arrived => {}
                () = clock.sleep_until_ms(wake_ms) => {}
            }
        }
    }

    async fn hold(&self) {
        let mut releases = self.releases.subscribe();
        let so_far = *releases.borrow_and_update();
        let _held = Held::new(self);
        // `self` has the sender.
        let _ = releases.wait_for(|n| *n > so_far).await;
    }
}

/// Counts a reply as held, for as long as its caller waits for it.
struct Held<'a>(&'a Shared);

impl<'a> Held<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.held.send_modify(|held| *held += 1);
        Self(shared)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.send_modify(|held| *held -= 1);
    }
}

impl Asked {
    /// Without word of its entries none was touched.
    fn call(&self, fault: Option<Fault>, entries: Vec<Entry>) -> Call {
        let untouched = |raw: &str| Entry { raw: raw.to_owned(), fate: Fate::Untouched };
        let entries = match entries.is_empty() {
            true => self.entries().map(untouched).collect(),
            false => entries,
        };
        let (operation, body) = (self.operation.clone(), self.body.clone());
        Call { operation, body, entries, fault }
    }
}

fn refused(service: Service, refusal: &Refusal) -> Response<Full<Bytes>> {
    let Refusal { status, code, why } = refusal;
    let (kind, query) = match service {
        Service::Events => (code.clone(), None),
        // SQS was a query service before it spoke JSON, and still says its older codes beside.
        Service::Sqs => (format!("com.amazonaws.sqs#{code}"), Some(query_code(code))),
    };
    let body = json!({"__type": kind, "message": why}).to_string();
    let mut response = response(service, *status, body.into());
    if let Some(query) = query {
        let value = format!("{query};Sender").parse().expect("a code is a header's value");
        response.headers_mut().insert("x-amzn-query-error", value);
    }
    response
}

fn query_code(code: &str) -> String {
    let renamed = match code {
        "QueueDoesNotExist" => "NonExistentQueue",
        "QueueNameExists" => return "QueueAlreadyExists".to_owned(),
        "BatchEntryIdsNotDistinct"
        | "BatchRequestTooLong"
        | "EmptyBatchRequest"
        | "InvalidBatchEntryId"
        | "MessageNotInflight"
        | "TooManyEntriesInBatchRequest" => code,
        _ => return code.to_owned(),
    };
    format!("AWS.SimpleQueueService.{renamed}")
}

fn response(service: Service, status: u16, body: Bytes) -> Response<Full<Bytes>> {
    let content_type = match service {
        Service::Events => "application/x-amz-json-1.1",
        Service::Sqs => "application/x-amz-json-1.0",
    };
    Response::builder()
        .status(status)
        .header("content-type", content_type)
        .header("x-amzn-requestid", "00000000-0000-4000-8000-000000000000")
        .body(Full::new(body))
        .expect("a status")
}

/// Past hyper, which answers a request once.
async fn answer_twice(
    socket: &TcpStream,
    reply: Response<Full<Bytes>>,
) -> io::Result<Response<Full<Bytes>>> {
    let status = reply.status();
    let body = match reply.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(never) => match never {},
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/x-amz-json-1.1\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let once = [head.as_bytes(), &body].concat();
    // The socket does not block: replies are small, and its buffer is empty.
    io::Write::write_all(&mut &*socket, &once.repeat(2))?;
    Err(io::ErrorKind::ConnectionAborted.into())
}
