//! The payment service's calls, from a request's body to a reply's bytes.
//!
//! tonic's generated server does the same for every codec, compression and stream there is: three boxed
//! futures, two buffers and a boxed body to a call, a third of what a small call costs. Here one message
//! comes in and one goes out, and what a call has read is not kept while it waits for the store: with
//! hundreds of calls in flight that no longer fits into the caches.

use std::{
    future::{Future, ready},
    pin::{Pin, pin},
};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use http_body::Body;
use http_body_util::BodyExt;
use prost::Message;
use tonic::{Code, Status};

use super::{
    MAX_REPLY_BYTES, MAX_REQUEST_BYTES,
    codec::malformed,
    error::{Failure, Reason},
    pb::payment::v1 as pb,
};
use crate::{domain::payment::Trace, slot::Slot};

static GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
static IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// Before each message: a flag, which is 1 for a compressed one, and the length in big-endian
/// (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX_BYTES: usize = 5;
const UNCOMPRESSED: u8 = 0;
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// What comes with a request's message.
pub struct Head {
    pub headers: HeaderMap,
    pub trace: Trace,
    /// For a call that is held on purpose; health has none.
    pub slot: Option<Slot>,
}

pub struct Call<M> {
    pub head: Head,
    pub message: M,
}

pub struct Reply<M> {
    pub message: M,
    /// It is the first answer to the request's idempotency key, given once more.
    pub replayed: bool,
}

impl<M> Reply<M> {
    pub const fn new(message: M) -> Self {
        Self { message, replayed: false }
    }
}

/// What a method comes to.
pub type Answered<M> = Result<Reply<M>, Status>;

/// The methods of `payment.v1.PaymentService`.
///
/// A method reads its call when it is called, not when its future is polled: what the future needs is all
/// that it keeps.
pub trait Calls: Send + Sync + 'static {
    fn create_payment_intent(
        &self,
        call: Call<pb::CreatePaymentIntentRequest>,
    ) -> impl Future<Output = Answered<pb::CreatePaymentIntentResponse>> + Send;

    fn get_payment_intent(
        &self,
        call: Call<pb::GetPaymentIntentRequest>,
    ) -> impl Future<Output = Answered<pb::GetPaymentIntentResponse>> + Send;

    fn get_payment_status(
        &self,
        call: Call<pb::GetPaymentStatusRequest>,
    ) -> impl Future<Output = Answered<pb::GetPaymentStatusResponse>> + Send;

    fn process_payment(
        &self,
        call: Call<pb::ProcessPaymentRequest>,
    ) -> impl Future<Output = Answered<pb::ProcessPaymentResponse>> + Send;

    fn cancel_payment(
        &self,
        call: Call<pb::CancelPaymentRequest>,
    ) -> impl Future<Output = Answered<pb::CancelPaymentResponse>> + Send;

    fn list_payments(
        &self,
        call: Call<pb::ListPaymentsRequest>,
    ) -> impl Future<Output = Answered<pb::ListPaymentsResponse>> + Send;

    fn simulate_webhook(
        &self,
        call: Call<pb::SimulateWebhookRequest>,
    ) -> impl Future<Output = Answered<pb::SimulateWebhookResponse>> + Send;
}

/// A call under way. The reply's body is one message with its prefix.
pub type Answering<'a> =
    Pin<Box<dyn Future<Output = Result<http::Response<Bytes>, Status>> + Send + 'a>>;

/// Calls the method of this name with the bytes of its message.
pub fn call<'a, T: Calls>(calls: &'a T, method: &str, head: Head, message: Bytes) -> Answering<'a> {
    match method {
        "CreatePaymentIntent" => run(head, message, |call| calls.create_payment_intent(call)),
        "GetPaymentIntent" => run(head, message, |call| calls.get_payment_intent(call)),
        "GetPaymentStatus" => run(head, message, |call| calls.get_payment_status(call)),
        "ProcessPayment" => run(head, message, |call| calls.process_payment(call)),
        "CancelPayment" => run(head, message, |call| calls.cancel_payment(call)),
        "ListPayments" => run(head, message, |call| calls.list_payments(call)),
        "SimulateWebhook" => run(head, message, |call| calls.simulate_webhook(call)),
        _ => Box::pin(ready(Err(Status::new(Code::Unimplemented, "")))),
    }
}

fn run<'a, M, R, A>(head: Head, message: Bytes, method: impl FnOnce(Call<M>) -> A) -> Answering<'a>
where
    M: Message + Default,
    R: Message,
    A: Future<Output = Answered<R>> + Send + 'a,
{
    match M::decode(message) {
        Ok(message) => {
            let answering = method(Call { head, message });
            Box::pin(async { encode(&answering.await?) })
        }
        Err(error) => Box::pin(ready(Err(malformed(error)))),
    }
}

/// The message of a request. Further ones are passed over, as other servers do it. Ends when the caller has
/// said all that it says.
pub async fn read<B: Body<Data = Bytes>>(body: B) -> Result<Bytes, Status> {
    let mut body = pin!(body);
    let mut message = Incomplete::default();
    while let Some(frame) = body.as_mut().frame().await {
        let Ok(frame) = frame else { break };
        if let Ok(data) = frame.into_data() {
            message.take(data)?;
        }
        // Often known with the last frame, which then need not be waited for.
        if body.is_end_stream() {
            break;
        }
    }
    message.finish()
}

/// What has come of a message. Most come in one piece, and stay where they are.
#[derive(Default)]
struct Incomplete {
    bytes: Bytes,
    /// With the prefix, once that has come.
    length: Option<usize>,
    beyond: PassedOver,
}

impl Incomplete {
    fn is_whole(&self) -> bool {
        self.length.is_some_and(|length| self.bytes.len() >= length)
    }

    fn take(&mut self, data: Bytes) -> Result<(), Status> {
        if self.is_whole() {
            return self.beyond.take(&data);
        }
        if self.bytes.is_empty() {
            self.bytes = data;
        } else {
            let mut both = BytesMut::from(std::mem::take(&mut self.bytes));
            both.put(data);
            self.bytes = both.freeze();
        }
        if self.length.is_none()
            && let Some(prefix) = self.bytes.first_chunk()
        {
            self.length = Some(PREFIX_BYTES + length(*prefix)?);
        }
        match self.length {
            Some(length) if self.bytes.len() > length => {
                let beyond = self.bytes.split_off(length);
                self.beyond.take(&beyond)
            }
            Some(_) | None => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Bytes, Status> {
        match self.is_whole() && self.beyond.is_whole() {
            true => Ok(self.bytes.split_off(PREFIX_BYTES)),
            false => Err(no_message()),
        }
    }
}

/// Messages of which nothing is kept.
#[derive(Default)]
struct PassedOver {
    prefix: [u8; PREFIX_BYTES],
    prefix_read: usize,
    /// Bytes of the message that are still to come.
    left: usize,
}

impl PassedOver {
    fn take(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            let passed = if self.left > 0 {
                let passed = self.left.min(data.len());
                self.left -= passed;
                passed
            } else {
                let missing = &mut self.prefix[self.prefix_read..];
                let passed = missing.len().min(data.len());
                missing[..passed].copy_from_slice(&data[..passed]);
                self.prefix_read += passed;
                if self.prefix_read == PREFIX_BYTES {
                    self.left = length(self.prefix)?;
                    self.prefix_read = 0;
                }
                passed
            };
            data = &data[passed..];
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.left == 0 && self.prefix_read == 0
    }
}

/// What a prefix says, where it may say so.
fn length([flag, length @ ..]: [u8; PREFIX_BYTES]) -> Result<usize, Status> {
    if flag != UNCOMPRESSED {
        return Err(no_message());
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_REQUEST_BYTES {
        let text = format!("a request is at most {MAX_REQUEST_BYTES} bytes");
        return Err(Failure::new(Reason::MessageTooLarge, text).into());
    }
    Ok(length)
}

fn no_message() -> Status {
    let text = "the body must be one whole, uncompressed gRPC message";
    Failure::new(Reason::Malformed, text).into()
}

/// No compression is spoken here, and a caller is told which are: none.
pub fn check_encoding(headers: &HeaderMap) -> Result<(), Status> {
    match headers.get(&GRPC_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => Ok(()),
        Some(other) => {
            let other = String::from_utf8_lossy(other);
            let text = format!("grpc-encoding {other:?} is not spoken here; identity is");
            let mut status = Status::new(Code::Unimplemented, text);
            let spoken = tonic::metadata::MetadataValue::from_static("identity");
            status.metadata_mut().insert("grpc-accept-encoding", spoken);
            Err(status)
        }
    }
}

fn encode<M: Message>(reply: &Reply<M>) -> Result<http::Response<Bytes>, Status> {
    let length = reply.message.encoded_len();
    if length > MAX_REPLY_BYTES {
        return Err(Failure::internal(format!("a reply of {length} bytes")).into());
    }
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + length);
    bytes.put_u8(UNCOMPRESSED);
    bytes.put_u32(u32::try_from(length).expect("it is at most MAX_REPLY_BYTES"));
    reply.message.encode_raw(&mut bytes);
    let mut response = http::Response::new(bytes.into());
    let headers = response.headers_mut();
    // An empty map makes room for six, 600 bytes for each call in flight.
    headers.reserve(1);
    headers.insert(header::CONTENT_TYPE, GRPC);
    if reply.replayed {
        headers.insert(&IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[UNCOMPRESSED], &length[..], message].concat()
    }

    /// The body in pieces of a size.
    fn read(body: &[u8], piece: usize) -> Result<Bytes, Status> {
        let mut message = Incomplete::default();
        for piece in body.chunks(piece) {
            message.take(Bytes::copy_from_slice(piece))?;
        }
        message.finish()
    }

    #[test]
    fn a_message_is_the_same_in_whatever_pieces_it_comes() {
        let (one, empty) = (framed(b"hello"), framed(b""));
        for piece in 1..=20 {
            assert_eq!(read(&one, piece).unwrap(), "hello", "{piece}");
            assert_eq!(read(&empty, piece).unwrap(), "", "{piece}");
            let several = [&one[..], &empty, &framed(b"more")].concat();
            assert_eq!(read(&several, piece).unwrap(), "hello", "{piece}");
            for cut in 1..several.len() {
                let whole = [one.len(), one.len() + empty.len()].contains(&cut);
                assert_eq!(read(&several[..cut], piece).is_ok(), whole, "{piece} {cut}");
            }
        }
    }
}
