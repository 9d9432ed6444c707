//! The outermost service: every request passes here, and every refusal leaves as a gRPC reply.
//!
//! It never fails (`Error = Infallible`): an error that left it would make the server reset the stream, and the
//! caller would not learn why. Dropping a handler at its deadline is safe, because a commit outlives the
//! handler that asked for it.

mod replies;

use std::any::Any;
use std::cell::Cell;
use std::convert::Infallible;
use std::error::Error;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use hyper::service::{Service, service_fn};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::Service as _;

use crate::api;
use crate::api::error::{Failure, Reason};
use crate::api::unary::{self, Calls};
use crate::clock::Stopwatch;
use crate::domain::payment::Trace;
use crate::domain::validation::Violation;
use crate::log_budget::LogBudget;
use crate::metrics::{GRPC_METHODS, Metrics, UNKNOWN_METHOD};
use crate::slot::{Places, ReleaseAtEnd, Slot};

use replies::{NoRoom, Reply, Untaken};

/// The service that is matched first; everything else goes through tonic's router.
const PAYMENTS: &str = "payment.v1.PaymentService";

/// Answered whatever the load: a busy server is not a sick one, and the check costs nothing.
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";

/// Calls whose reply has no end of its own: no deadline, but they end with their connection.
const STREAMS: [&str; 3] = [
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

// As names rather than text, which would be parsed anew at every look-up.
static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
static GRPC_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Lines about requests a second, each for the ordinary ones and for our own faults: enough to follow one
/// client, too few to slow down thirty thousand requests.
const LINES_PER_SECOND: u32 = 100;

/// What the edge tells the metrics.
pub trait Observe: Send + Sync + 'static {
    /// A call has ended. The labels come from a static table: a caller cannot make new ones.
    fn handled(&self, service: &'static str, method: &'static str, code: Code, elapsed: Duration);
    /// A handler panicked, and its caller got INTERNAL.
    fn panicked(&self);
    /// So many log lines were not written.
    fn log_lines_suppressed(&self, n: u64);
}

impl Observe for Metrics {
    fn handled(&self, service: &'static str, method: &'static str, code: Code, elapsed: Duration) {
        self.grpc_handled(service, method, code, elapsed);
    }

    fn panicked(&self) {
        Metrics::panicked(self);
    }

    fn log_lines_suppressed(&self, n: u64) {
        Metrics::log_lines_suppressed(self, n);
    }
}

/// Bounds on requests, over all connections and runtimes.
#[derive(Clone, Debug)]
pub struct EdgeLimits {
    /// Requests being handled at a time: at 30,000 a second these are 0.3 s of work. More are refused at
    /// once, because a longer queue only serves callers that have given up.
    pub max_in_flight: usize,
    /// The longest that a handler may take; a caller may want less.
    pub deadline: Duration,
    /// Bytes of replies that wait for their clients to take them, of all connections and of one. A client
    /// may ask for 128 lists of 512 KiB each and take none; the connection's share is 16 such lists, and
    /// a sixteenth of the whole, so that a few such clients do not take the room of the others.
    pub untaken_max: usize,
    pub connection_untaken_max: usize,
}

impl Default for EdgeLimits {
    fn default() -> Self {
        Self {
            max_in_flight: 8192,
            deadline: Duration::from_secs(10),
            untaken_max: 128 << 20,
            connection_untaken_max: 8 << 20,
        }
    }
}

/// What the requests of one connection share.
struct Connection<T> {
    edge: Edge<T>,
    ending: CancellationToken,
    untaken: Untaken,
}

/// Everything behind the gRPC port. Clones are handles of one.
pub struct Edge<T>(Arc<Shared<T>>);

struct Shared<T> {
    payments: T,
    routes: Routes,
    limits: EdgeLimits,
    places: Arc<Places>,
    untaken: Arc<Semaphore>,
    observe: Arc<dyn Observe>,
    lines: LogBudget,
    faults: LogBudget,
}

impl<T> Clone for Edge<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// A call under way. Boxed: whoever runs it moves it about several times.
type Answering = Pin<Box<dyn Future<Output = Result<Response<Reply>, Infallible>> + Send>>;

/// A request that is let in: its place, unless it needs none, and how long it may take.
struct Admitted {
    place: Option<ReleaseAtEnd>,
    deadline: Duration,
}

impl<T: Calls> Edge<T> {
    /// `routes` is what is behind the payment service: see [`api::routes`].
    pub fn new(payments: T, routes: Routes, limits: EdgeLimits, observe: Arc<dyn Observe>) -> Self {
        Self(Arc::new(Shared {
            payments,
            routes: routes.prepare(),
            places: Arc::new(Places::new(limits.max_in_flight)),
            untaken: Arc::new(Semaphore::new(limits.untaken_max)),
            limits,
            observe,
            lines: LogBudget::new(LINES_PER_SECOND),
            faults: LogBudget::new(LINES_PER_SECOND),
        }))
    }

    /// Requests being handled now; held calls that gave their place back do not count.
    pub fn in_flight(&self) -> usize {
        self.0.places.taken()
    }

    /// The service of one connection; its streams end when `ending` is cancelled.
    pub fn connection<B>(
        &self,
        ending: CancellationToken,
    ) -> impl Service<
        Request<B>,
        Response = Response<Reply>,
        Error = Infallible,
        Future: Send + Unpin + 'static,
    >
    + Send
    + 'static
    + use<T, B>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>> + Send,
    {
        let untaken = Untaken::new(self.0.limits.connection_untaken_max, &self.0.untaken);
        // Counted by Arc: a token's own clone takes a lock, and only streams want one.
        let connection = Arc::new(Connection { edge: self.clone(), ending, untaken });
        service_fn(move |request| answer(Arc::clone(&connection), request))
    }

    /// Takes a place for a request and finds its deadline; streams have none.
    fn admit<B>(&self, request: &Request<B>, untaken: &Untaken) -> Result<Admitted, Refusal> {
        check_protocol(request)?;
        let wanted = grpc_timeout(request.headers())?;
        if !untaken.has_room() {
            return Err(too_much_untaken(NoRoom));
        }
        let place = match request.uri().path().starts_with(HEALTH_PREFIX) {
            true => None,
            false => Some(ReleaseAtEnd(Slot::take(&self.0.places).ok_or_else(overloaded)?)),
        };
        let longest = self.0.limits.deadline;
        Ok(Admitted { place, deadline: wanted.map_or(longest, |wanted| wanted.min(longest)) })
    }

    async fn within<R>(
        &self,
        deadline: Duration,
        work: Pin<&mut impl Future<Output = Result<R, Refusal>>>,
    ) -> Result<R, Refusal> {
        timeout(deadline, self.survive(work)).await.map_err(|_elapsed| too_late(deadline))??
    }

    /// Runs a handler and counts its panic, should it end in one.
    async fn survive<R>(
        &self,
        mut handler: Pin<&mut impl Future<Output = R>>,
    ) -> Result<R, Refusal> {
        let answered = poll_fn(|cx| {
            // Unwind safe: a handler that has panicked is dropped and never polled again, and what it
            // shared is guarded by its own locks; a panic inside the store aborts the process before it
            // gets here.
            match catch_unwind(AssertUnwindSafe(|| handler.as_mut().poll(cx))) {
                Ok(Poll::Pending) => Poll::Pending,
                Ok(Poll::Ready(result)) => Poll::Ready(Ok(result)),
                Err(panic) => Poll::Ready(Err(panic_text(panic.as_ref()))),
            }
        });
        answered.await.map_err(|panic| {
            self.0.observe.panicked();
            Failure::internal(format!("a handler panicked: {panic}")).into()
        })
    }
}

fn answer<T, B>(connection: Arc<Connection<T>>, request: Request<B>) -> Answering
where
    T: Calls,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>> + Send,
{
    let admitted = connection.edge.admit(&request, &connection.untaken);
    let (labels, trace) = (labels(request.uri().path()), Trace::of(request.headers()));
    let account = Account::open(connection, labels, trace);
    match admitted {
        Ok(admitted) if labels.0 == PAYMENTS => {
            Box::pin(answer_payment(account, admitted, request))
        }
        Ok(admitted) => Box::pin(answer_other(account, admitted, request)),
        Err(refusal) => Box::pin(async { Ok(account.close(Err(refusal))) }),
    }
}

/// A block and no async function, which would keep all that it is given twice.
fn answer_payment<T: Calls, B: http_body::Body<Data = Bytes> + Unpin>(
    account: Account<T>,
    Admitted { place, deadline }: Admitted,
    request: Request<B>,
) -> impl Future<Output = Result<Response<Reply>, Infallible>> {
    let (head, mut body) = request.into_parts();
    let encoding = unary::check_encoding(&head.headers);
    let slot = place.as_ref().map(|place| place.0.clone());
    let mut head = Some(unary::Head { headers: head.headers, trace: account.trace, slot });
    async move {
        let _place = place;
        let answered = {
            let Connection { edge, untaken, .. } = &*account.connection;
            let count = |message| untaken.count(message).map_err(too_much_untaken);
            let call = pin!(async {
                encoding?;
                let message = unary::read(&mut body).await?;
                let head = head.take().expect("a future is not polled to its end twice");
                let answering = unary::call(&edge.0.payments, account.labels.1, head, message);
                map_body(answering.await?, count)
            });
            edge.within(deadline, call).await
        };
        Ok(account.close(answered))
    }
}

/// Health, reflection, simulation: these are few, and go through tonic's router.
async fn answer_other<T, B>(
    account: Account<T>,
    Admitted { place, deadline }: Admitted,
    mut request: Request<B>,
) -> Result<Response<Reply>, Infallible>
where
    T: Calls,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>> + Send,
{
    let _place = place;
    request.extensions_mut().insert(account.trace);
    let answered = account.connection.route(deadline, request).await;
    Ok(account.close(answered))
}

impl<T: Calls> Connection<T> {
    async fn route<B>(
        &self,
        deadline: Duration,
        request: Request<B>,
    ) -> Result<Response<Reply>, Refusal>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>> + Send,
    {
        let Self { edge, untaken, ending } = self;
        let is_stream = STREAMS.contains(&request.uri().path());
        let mut routes = edge.0.routes.clone();
        let mut call = pin!(async move {
            let Ok(response) = routes.call(request).await;
            response
        });
        if is_stream {
            let response = in_our_words(edge.survive(call.as_mut()).await?);
            return map_body(response, |body| Ok(Body::new(Ending::new(body, ending.clone()))));
        }
        let encoded = pin!(async {
            let response = in_our_words(call.await);
            untaken.encode(response).await.map_err(too_much_untaken)
        });
        edge.within(deadline, encoded).await
    }
}

fn map_body<B, R: Into<Reply>>(
    response: Response<B>,
    map: impl FnOnce(B) -> Result<R, Refusal>,
) -> Result<Response<Reply>, Refusal> {
    let (head, body) = response.into_parts();
    Ok(Response::from_parts(head, map(body)?.into()))
}

/// A refusal and the HTTP status that it goes out with: 200, save for what is no gRPC at all.
struct Refusal {
    status: Status,
    http: StatusCode,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, http: StatusCode::OK }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Status::from(failure).into()
    }
}

impl Refusal {
    fn into_response(self) -> Response<Reply> {
        let mut response = self.status.into_http().map(|()| Reply::Nothing);
        *response.status_mut() = self.http;
        if self.http == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        }
        response
    }
}

fn overloaded() -> Refusal {
    Failure::new(Reason::Overloaded, "too many requests in flight").into()
}

fn too_much_untaken(_: NoRoom) -> Refusal {
    let text = "too much of earlier replies has not been taken yet";
    Failure::new(Reason::Overloaded, text).into()
}

fn too_late(deadline: Duration) -> Refusal {
    let text = format!("no reply within {} ms", deadline.as_millis());
    Failure::new(Reason::Deadline, text).into()
}

/// Refuses what is no gRPC: browsers and probes that have the wrong port, and encodings that we don't speak.
fn check_protocol<B>(request: &Request<B>) -> Result<(), Refusal> {
    let malformed =
        |http, text| Err(Refusal { status: Failure::new(Reason::Malformed, text).into(), http });
    if request.method() != Method::POST {
        return malformed(StatusCode::METHOD_NOT_ALLOWED, "gRPC calls are POST requests");
    }
    let content_type = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if !content_type.is_some_and(is_grpc) {
        return malformed(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "this port speaks gRPC: content-type must be application/grpc or application/grpc+proto",
        );
    }
    Ok(())
}

/// Not grpc-web, not another message format; parameters are ignored.
fn is_grpc(content_type: &[u8]) -> bool {
    let kind = content_type.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    kind.eq_ignore_ascii_case(b"application/grpc")
        || kind.eq_ignore_ascii_case(b"application/grpc+proto")
}

/// The caller's deadline: 1 to 8 digits and a unit.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    let Some(value) = headers.get(&GRPC_TIMEOUT) else { return Ok(None) };
    parse_timeout(value.as_bytes()).map(Some).ok_or_else(|| {
        let rule = "must be 1 to 8 digits and one of the units H, M, S, m, u, n";
        Failure::invalid(vec![Violation::new(GRPC_TIMEOUT.as_str(), rule)]).into()
    })
}

fn parse_timeout(value: &[u8]) -> Option<Duration> {
    const MAX_DIGITS: usize = 8;
    let (unit, digits) = value.split_last()?;
    let all_digits = digits.iter().all(u8::is_ascii_digit);
    if digits.is_empty() || digits.len() > MAX_DIGITS || !all_digits {
        return None;
    }
    let n = digits.iter().fold(0, |n, digit| n * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Some(Duration::from_secs(n * 3600)),
        b'M' => Some(Duration::from_secs(n * 60)),
        b'S' => Some(Duration::from_secs(n)),
        b'm' => Some(Duration::from_millis(n)),
        b'u' => Some(Duration::from_micros(n)),
        b'n' => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "(no text)".to_owned())
}

/// The code of a reply whose headers end it; one that goes on went well.
fn code_of(headers: &HeaderMap) -> Code {
    headers.get(&GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// tonic's own refusals of a request, in the contract's words. They are told from ours by having no
/// google.rpc details, which every [`Failure`] has.
fn in_our_words(response: Response<Body>) -> Response<Body> {
    let code = code_of(response.headers());
    if code == Code::Ok || response.headers().contains_key(&GRPC_DETAILS) {
        return response;
    }
    match code {
        // tonic's answer to a message over the limit.
        Code::OutOfRange => {
            let text = format!("a request is at most {} bytes", api::MAX_REQUEST_BYTES);
            Status::from(Failure::new(Reason::MessageTooLarge, text)).into_http()
        }
        // tonic's answer to a body that is not exactly one message: none, cut off, a flag that is not 0.
        Code::Internal | Code::Unknown => {
            let text = "the body must be one whole, uncompressed gRPC message";
            Status::from(Failure::new(Reason::Malformed, text)).into_http()
        }
        _ => response,
    }
}

/// The metrics' labels of a path.
fn labels(path: &str) -> (&'static str, &'static str) {
    let Some((service, method)) = path.strip_prefix('/').and_then(|p| p.split_once('/')) else {
        return UNKNOWN_METHOD;
    };
    GRPC_METHODS
        .iter()
        .find(|known| known.1 == method && known.0 == service)
        .copied()
        .unwrap_or(UNKNOWN_METHOD)
}

/// One call's entry in metrics and log, written when it is dropped: also when the caller hangs up, which
/// drops the whole call.
struct Account<T> {
    connection: Arc<Connection<T>>,
    labels: (&'static str, &'static str),
    trace: Trace,
    watch: Stopwatch,
    code: Code,
}

impl<T> Account<T> {
    fn open(
        connection: Arc<Connection<T>>,
        labels: (&'static str, &'static str),
        trace: Trace,
    ) -> Self {
        Self { connection, labels, trace, watch: Stopwatch::start(), code: Code::Cancelled }
    }

    fn close(mut self, answered: Result<Response<Reply>, Refusal>) -> Response<Reply> {
        let response = answered.unwrap_or_else(Refusal::into_response);
        self.code = match response.body() {
            Reply::Message(_) => Code::Ok,
            _ => code_of(response.headers()),
        };
        if matches!(self.code, Code::Internal | Code::Unknown) {
            self.report(response.extensions().get::<Status>());
        }
        response
    }

    fn shared(&self) -> &Shared<T> {
        &self.connection.edge.0
    }

    /// A bug of ours, at error, with what the caller was not told.
    fn report(&self, status: Option<&Status>) {
        let Some(withheld) = self.shared().faults.spend() else { return };
        let cause = status.and_then(Error::source).map(tracing::field::display);
        let trace_id = hex::encode(self.trace.trace_id);
        tracing::error!(method = self.labels.1, %trace_id, withheld, cause, "internal error");
    }
}

impl<T> Drop for Account<T> {
    fn drop(&mut self) {
        let elapsed = self.watch.elapsed();
        let (service, method) = self.labels;
        let shared = self.shared();
        shared.observe.handled(service, method, self.code, elapsed);
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        if let Some(withheld) = shared.lines.spend() {
            shared.observe.log_lines_suppressed(withheld);
            let latency_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
            let trace_id = hex::encode(self.trace.trace_id);
            let code = self.code;
            tracing::debug!(service, method, ?code, latency_us, %trace_id, withheld, "handled");
        }
    }
}

/// Reads W3C trace context, and makes it up when the caller sends none.
impl Trace {
    /// As the caller says, else a new one.
    pub fn of(headers: &HeaderMap) -> Self {
        let said = headers.get(&TRACEPARENT).and_then(|value| Self::parse(value.as_bytes()));
        said.unwrap_or_else(Self::make)
    }

    fn make() -> Self {
        let mut trace_id = [0; 16];
        trace_id[..8].copy_from_slice(&random().to_be_bytes());
        trace_id[8..].copy_from_slice(&random().to_be_bytes());
        Self { trace_id, parent_span: random().to_be_bytes(), sampled: false }
    }

    /// `00-<32 hex>-<16 hex>-<2 hex>`; a later version may go on after another dash.
    fn parse(value: &[u8]) -> Option<Self> {
        const LENGTH: usize = 55;
        const SAMPLED: u8 = 1;
        let (known, rest) = value.split_at_checked(LENGTH)?;
        let mut version = [0];
        let (mut trace_id, mut parent_span, mut flags) = ([0; 16], [0; 8], [0]);
        let dashes = known[2] == b'-' && known[35] == b'-' && known[52] == b'-';
        // The hex crate takes upper case too, which the standard does not.
        if !dashes || known.iter().any(u8::is_ascii_uppercase) {
            return None;
        }
        hex::decode_to_slice(&known[..2], &mut version).ok()?;
        hex::decode_to_slice(&known[3..35], &mut trace_id).ok()?;
        hex::decode_to_slice(&known[36..52], &mut parent_span).ok()?;
        hex::decode_to_slice(&known[53..], &mut flags).ok()?;
        let length_fits = match version[0] {
            0 => rest.is_empty(),
            0xff => false,
            _ => rest.first().is_none_or(|&b| b == b'-'),
        };
        let valid = length_fits && trace_id != [0; 16] && parent_span != [0; 8];
        valid.then_some(Self { trace_id, parent_span, sampled: flags[0] & SAMPLED != 0 })
    }
}

/// Numbers for trace ids: unique, not secret. One system call a thread, then SplitMix64.
fn random() -> u64 {
    const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    thread_local! {
        static STATE: Cell<u64> =
            Cell::new(getrandom::u64().expect("the kernel has had randomness since it booted"));
    }
    let mut z = STATE.get().wrapping_add(GOLDEN_GAMMA);
    STATE.set(z);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A stream's body that ends with its connection: with UNAVAILABLE, so that the caller comes back elsewhere.
struct Ending {
    body: Body,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    done: bool,
}

impl Ending {
    fn new(body: Body, ending: CancellationToken) -> Self {
        Self { body, ended: Box::pin(ending.cancelled_owned()), done: false }
    }
}

impl http_body::Body for Ending {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.done {
            return Poll::Ready(None);
        }
        if self.ended.as_mut().poll(cx).is_ready() {
            self.done = true;
            let failure = Failure::new(Reason::Draining, "the connection is closing: call again");
            let (head, ()) = Status::from(failure).into_http::<()>().into_parts();
            return Poll::Ready(Some(Ok(Frame::trailers(head.headers))));
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.done || self.body.is_end_stream()
    }
}

#[cfg(test)]
pub(crate) mod testbed;
#[cfg(test)]
mod tests;
