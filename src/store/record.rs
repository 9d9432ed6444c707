//! Bytes of the records. The first byte of each is its version, so that one store can hold several.

use std::{ops::Bound, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};

use super::{Revision, StoreError, Versioned, tables::Span};
use crate::domain::{
    ids::{PaymentId, RequestHash},
    payment::{Payment, Progress, Terms},
    time::Timestamp,
};

const VERSION: u8 = 1;

/// Room for nearly every record, so that none grows step by step.
const USUAL_BYTES: usize = 512;

fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(USUAL_BYTES);
    bytes.push(VERSION);
    postcard::to_extend(record, bytes).expect("our records are of known length")
}

fn decode<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, StoreError> {
    let corrupt = |why: String| StoreError::Corrupt(format!("{what}: {why}"));
    match bytes.split_first() {
        Some((&VERSION, record)) => {
            postcard::from_bytes(record).map_err(|e| corrupt(e.to_string()))
        }
        Some((other, _)) => Err(corrupt(format!("record version {other}"))),
        None => Err(corrupt("empty record".to_owned())),
    }
}

pub fn terms(terms: &Terms) -> Vec<u8> {
    encode(terms)
}

pub fn progress(revision: Revision, progress: &Progress) -> Vec<u8> {
    encode(&(revision.0, progress))
}

/// The revision of a `State` entry; the rest is not looked at.
pub fn revision(state: Option<&[u8]>) -> Result<Revision, StoreError> {
    state.map_or(Ok(Revision(0)), |bytes| {
        let corrupt = || StoreError::Corrupt("state: no revision".to_owned());
        let record = bytes.get(1..).ok_or_else(corrupt)?;
        postcard::take_from_bytes(record).map(|(n, _)| Revision(n)).map_err(|_| corrupt())
    })
}

pub fn payment(terms: &[u8], state: Option<&[u8]>) -> Result<Versioned, StoreError> {
    let terms: Arc<Terms> = Arc::new(decode(terms, "payment")?);
    let Some(state) = state else {
        return Ok(Versioned { payment: Payment::create(terms), revision: Revision(0) });
    };
    let (revision, progress): (u64, Progress) = decode(state, "state")?;
    Ok(Versioned { payment: Payment { terms, progress }, revision: Revision(revision) })
}

/// Request hash, then payment id: fixed width, read on every keyed create.
pub fn created(request: RequestHash, id: PaymentId) -> Vec<u8> {
    [request.0, *id.bytes()].concat()
}

pub fn read_created(bytes: &[u8]) -> Result<(RequestHash, PaymentId), StoreError> {
    let bytes: &[u8; 32] =
        bytes.try_into().map_err(|_| StoreError::Corrupt("key: not 32 bytes".to_owned()))?;
    let (request, id) = bytes.split_at(16);
    let half = |part: &[u8]| part.try_into().expect("16 of 32 bytes");
    Ok((RequestHash(half(request)), PaymentId::from_bytes(half(id))))
}

pub fn reply(request: RequestHash, at: Timestamp, bytes: &[u8]) -> Vec<u8> {
    encode(&(request, at, bytes))
}

pub fn read_reply(record: &[u8]) -> Result<(RequestHash, Timestamp, Vec<u8>), StoreError> {
    decode(record, "reply")
}

/// Key in `Index`: newest first, so the id is inverted.
pub fn index_key(name: [u8; 8], id: PaymentId) -> Vec<u8> {
    let mut key = name.to_vec();
    key.extend(id.bytes().iter().map(|byte| !byte));
    key
}

/// All keys of `Index` under a name.
pub fn index_span(name: [u8; 8]) -> Span {
    let key = |id: [u8; 16]| [name.as_slice(), &id].concat();
    Span::forwards(Bound::Included(key([0; 16])), Bound::Included(key([0xff; 16])))
}

pub fn read_index_id(key: &[u8]) -> Result<PaymentId, StoreError> {
    let inverted: &[u8; 16] = key
        .get(8..)
        .and_then(|id| id.try_into().ok())
        .ok_or_else(|| StoreError::Corrupt("index: not 24 bytes".to_owned()))?;
    Ok(PaymentId::from_bytes(inverted.map(|byte| !byte)))
}

/// Key in `Due` and `Lapse`: a moment, then whatever lapses or wakes then.
pub fn timed_key(at: Timestamp, rest: &[u8; 16]) -> Vec<u8> {
    let mut key = at.ms().max(0).to_be_bytes().to_vec();
    key.extend(rest);
    key
}

pub fn read_timed_key(key: &[u8]) -> Result<(Timestamp, [u8; 16]), StoreError> {
    let corrupt = || StoreError::Corrupt("timed key: not 24 bytes".to_owned());
    let (at, rest) = key.split_at_checked(8).ok_or_else(corrupt)?;
    let at = i64::from_be_bytes(at.try_into().expect("8 bytes were split off"));
    Ok((Timestamp::from_ms(at), rest.try_into().map_err(|_| corrupt())?))
}

pub fn number(bytes: &[u8]) -> Result<u64, StoreError> {
    let bytes = bytes.try_into().map_err(|_| StoreError::Corrupt("not 8 bytes".to_owned()))?;
    Ok(u64::from_be_bytes(bytes))
}

pub fn id(key: &[u8]) -> Result<PaymentId, StoreError> {
    let bytes = key.try_into().map_err(|_| StoreError::Corrupt("id: not 16 bytes".to_owned()))?;
    Ok(PaymentId::from_bytes(bytes))
}
