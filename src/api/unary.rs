//! The payment service's calls, from a request's body to a reply's bytes.
//!
//! tonic's generated server does the same for every codec, compression and stream there is: three boxed
//! futures, two buffers and a boxed body to a call, a third of what a small call costs. Here one message
//! comes in and one goes out; what a method does is in tonic's generated trait all the same.

use std::pin::pin;

use bytes::{BufMut, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, header,
    request::{self, Request},
};
use http_body::Body;
use http_body_util::BodyExt;
use prost::Message;
use tonic::{Code, Response, Status, metadata::MetadataMap};

use super::{
    MAX_REPLY_BYTES, MAX_REQUEST_BYTES,
    codec::malformed,
    error::{Failure, Reason},
    pb::payment::v1::payment_service_server::PaymentService,
};

static GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// Before each message: a flag, which is 1 for a compressed one, and the length in big-endian
/// (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX_BYTES: usize = 5;
const UNCOMPRESSED: u8 = 0;
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Runs the method of this name. The reply's body is one message with its prefix.
pub fn call<T: PaymentService, B>(
    payments: &T,
    method: &'static str,
    request: Request<B>,
) -> impl Future<Output = Result<http::Response<Bytes>, Status>> + Send
where
    B: Body<Data = Bytes> + Send,
{
    // Taken apart here, so that the whole of it is not kept beside its parts.
    let (head, body) = request.into_parts();
    async move {
        let message = read(&head.headers, body).await?;
        match method {
            "CreatePaymentIntent" => {
                reply(payments.create_payment_intent(decode(head, message)?).await?)
            }
            "GetPaymentIntent" => reply(payments.get_payment_intent(decode(head, message)?).await?),
            "GetPaymentStatus" => reply(payments.get_payment_status(decode(head, message)?).await?),
            "ProcessPayment" => reply(payments.process_payment(decode(head, message)?).await?),
            "CancelPayment" => reply(payments.cancel_payment(decode(head, message)?).await?),
            "ListPayments" => reply(payments.list_payments(decode(head, message)?).await?),
            "SimulateWebhook" => reply(payments.simulate_webhook(decode(head, message)?).await?),
            _ => Err(Status::new(Code::Unimplemented, "")),
        }
    }
}

/// The message of a request, which has exactly one; what comes after it is not looked at, as other servers
/// do it. Ends when the caller has said all that it says.
async fn read<B: Body<Data = Bytes>>(headers: &HeaderMap, body: B) -> Result<Bytes, Status> {
    check_encoding(headers)?;
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
}

impl Incomplete {
    fn is_whole(&self) -> bool {
        self.length.is_some_and(|length| self.bytes.len() >= length)
    }

    fn take(&mut self, data: Bytes) -> Result<(), Status> {
        if self.is_whole() {
            return Ok(());
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
        Ok(())
    }

    fn finish(mut self) -> Result<Bytes, Status> {
        match self.length {
            Some(length) if self.bytes.len() >= length => {
                self.bytes.truncate(length);
                Ok(self.bytes.split_off(PREFIX_BYTES))
            }
            Some(_) | None => Err(no_message()),
        }
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
fn check_encoding(headers: &HeaderMap) -> Result<(), Status> {
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

fn decode<M: Message + Default>(
    head: request::Parts,
    message: Bytes,
) -> Result<tonic::Request<M>, Status> {
    let message = M::decode(message).map_err(malformed)?;
    let metadata = MetadataMap::from_headers(head.headers);
    Ok(tonic::Request::from_parts(metadata, head.extensions, message))
}

fn reply<M: Message>(response: Response<M>) -> Result<http::Response<Bytes>, Status> {
    let (metadata, message, _) = response.into_parts();
    let length = message.encoded_len();
    if length > MAX_REPLY_BYTES {
        return Err(Failure::internal(format!("a reply of {length} bytes")).into());
    }
    let mut bytes = Vec::with_capacity(PREFIX_BYTES + length);
    bytes.put_u8(UNCOMPRESSED);
    bytes.put_u32(u32::try_from(length).expect("it is at most MAX_REPLY_BYTES"));
    message.encode_raw(&mut bytes);
    let mut reply = http::Response::new(bytes.into());
    *reply.headers_mut() = metadata.into_headers();
    reply.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    Ok(reply)
}
