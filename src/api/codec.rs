//! Protobuf over gRPC, with a request that does not decode being the caller's mistake.
//!
//! tonic's own codec answers INTERNAL there, which with us means a bug.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstEncoder};

use super::error::{Failure, Reason};

/// First size of a call's buffers, in bytes: most messages fit, and tonic's default of 8 KiB would be
/// allocated twice a request.
const BUFFER_BYTES: usize = 1024;

/// How much a streamed reply gathers before it is sent, in bytes: tonic's default.
const YIELD_BYTES: usize = 32 * 1024;

fn buffers() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
}

/// Named in `build.rs`: the generated services use it.
#[derive(Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = MalformedAware<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(buffers())
    }

    fn decoder(&mut self) -> Self::Decoder {
        MalformedAware(PhantomData)
    }
}

/// Decodes, or says MALFORMED.
#[derive(Debug)]
pub struct MalformedAware<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for MalformedAware<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::decode(buf).map(Some).map_err(malformed)
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

/// prost's text names the message and the field, which is what the caller needs.
pub(super) fn malformed(error: prost::DecodeError) -> Status {
    Failure::new(Reason::Malformed, format!("the message does not decode: {error}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::pb::payment::v1::CreatePaymentIntentRequest;
    use tonic_types::StatusExt;

    #[test]
    fn what_does_not_decode_is_malformed() {
        // Field 1 (a string) as a varint, and a length that runs past the end.
        for bytes in [&[0x08, 0x01][..], &[0x0a, 0x7f, 0x61][..]] {
            let status = CreatePaymentIntentRequest::decode(bytes).map_err(malformed).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            let info = status.get_details_error_info().unwrap();
            assert_eq!(info.reason, "MALFORMED");
        }
    }
}
