//! Bytes of the records. The first byte of each is its version, so that one store can hold several.

use std::{fmt, marker::PhantomData, ops::Bound, sync::Arc};

use postcard::ser_flavors::Flavor;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};

use super::{
    Revision, StoreError, Versioned,
    book::Dues,
    tables::{Span, Table},
};
use crate::domain::{
    card::Card,
    delivery::Notification,
    ids::{PaymentId, RequestHash},
    money::Money,
    payment::{Method, Payment, PaymentState, Progress, Terms},
    refund::Refund,
    scenario::Plan,
    status::Status,
    time::Timestamp,
    timeline,
};

const VERSION: u8 = 1;

/// Appends to bytes that are there already.
struct Append<'a>(&'a mut Vec<u8>);

impl Flavor for Append<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

fn encode<T: Serialize>(record: &T, bytes: &mut Vec<u8>) {
    bytes.push(VERSION);
    postcard::serialize_with_flavor(record, Append(bytes))
        .expect("our records are of known length");
}

/// What a record begins with, if `T` is not all of it.
fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, StoreError> {
    let corrupt = |why: String| StoreError::Corrupt(format!("{what}: {why}"));
    match bytes.split_first() {
        Some((&VERSION, record)) => {
            postcard::from_bytes(record).map_err(|e| corrupt(e.to_string()))
        }
        Some((other, _)) => Err(corrupt(format!("record version {other}"))),
        None => Err(corrupt("empty record".to_owned())),
    }
}

pub fn terms(terms: &Terms, bytes: &mut Vec<u8>) {
    encode(terms, bytes);
}

pub fn progress(revision: Revision, progress: &Progress, bytes: &mut Vec<u8>) {
    encode(&(revision.0, progress), bytes);
}

/// What a payment in `Due` waits for.
pub fn dues(dues: &Dues, bytes: &mut Vec<u8>) {
    encode(dues, bytes);
}

pub fn read_dues(record: &[u8]) -> Result<Dues, StoreError> {
    decode(record, "due")
}

/// The revision of a `State` entry; the rest is not looked at.
pub fn revision(state: Option<&[u8]>) -> Result<Revision, StoreError> {
    state.map_or(Ok(Revision(0)), |bytes| {
        let corrupt = || StoreError::Corrupt("state: no revision".to_owned());
        let record = bytes.get(1..).ok_or_else(corrupt)?;
        postcard::take_from_bytes(record).map(|(n, _)| Revision(n)).map_err(|_| corrupt())
    })
}

/// What retention asks of a payment's progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub is_settled: bool,
    pub has_dead: bool,
    pub updated_at: Timestamp,
}

impl From<&Progress> for Standing {
    fn from(progress: &Progress) -> Self {
        Self {
            is_settled: progress.is_settled(),
            has_dead: progress.has_dead(),
            updated_at: progress.updated_at,
        }
    }
}

/// The standing of a payment by its `State` entry: what says nothing of it is passed over, not taken in.
pub fn standing(state: &[u8]) -> Result<Standing, StoreError> {
    let (_, brief) = decode::<(u64, ProgressBrief<'_>)>(state, "state")?;
    let is_owed = brief.notifications.iter().any(Notification::is_owed);
    Ok(Standing {
        is_settled: brief.state.wakes_at().is_none() && !is_owed,
        has_dead: brief.notifications.iter().any(Notification::has_dead),
        updated_at: brief.updated_at,
    })
}

/// `Progress`, in the order of its fields.
#[derive(Deserialize)]
struct ProgressBrief<'a> {
    state: PaymentState,
    _version: u32,
    updated_at: Timestamp,
    _card: Option<Card>,
    _vat: Option<u64>,
    _refunds: Passed<Refund>,
    #[serde(borrow)]
    _timeline: (Passed<EntryBrief<'a>>, u32),
    notifications: Vec<Notification>,
}

/// An entry of the timeline.
#[derive(Deserialize)]
struct EntryBrief<'a> {
    _at: Timestamp,
    _kind: timeline::Kind,
    _status: Status,
    _cause: timeline::Cause,
    #[serde(borrow)]
    _detail: Passed<(&'a str, &'a str)>,
}

/// A sequence of which nothing is kept.
struct Passed<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Passed<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(Self(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Passed<T> {
    type Value = Self;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("a sequence")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self, A::Error> {
        while elements.next_element::<T>()?.is_some() {}
        Ok(self)
    }
}

/// What `Terms` begin with: fields stand in a record in their order.
#[derive(Deserialize)]
pub struct TermsHead<'a> {
    pub id: PaymentId,
    _reservation_id: &'a [u8],
    _user_id: &'a [u8],
    _amount: Money,
    _vat: Option<u64>,
    _method: Method,
    plan: Plan,
    _provider: &'a [u8],
    webhook_url: Option<&'a [u8]>,
    events: bool,
}

/// The rest is not looked at.
pub fn terms_head(terms: &[u8]) -> Result<TermsHead<'_>, StoreError> {
    decode(terms, "payment")
}

impl TermsHead<'_> {
    pub const fn draws(&self) -> bool {
        self.plan.scenario.draws()
    }

    /// That of a payment without a `State` entry.
    pub fn standing(&self) -> Standing {
        let is_told = self.events || self.webhook_url.is_some();
        Standing {
            is_settled: self.plan.decided_at_once().is_some() && !is_told,
            has_dead: false,
            updated_at: self.id.made_at(),
        }
    }
}

pub fn payment(terms: &[u8], state: Option<&[u8]>) -> Result<Versioned, StoreError> {
    let terms: Arc<Terms> = Arc::new(decode(terms, "payment")?);
    let Some(state) = state else {
        return Ok(Versioned { payment: Payment::create(terms), revision: Revision(0) });
    };
    let (n, progress) = decode(state, "state")?;
    Ok(Versioned { payment: Payment { terms, progress }, revision: Revision(n) })
}

/// Request hash, then payment id: fixed width, read on every keyed create.
pub fn created(request: RequestHash, id: PaymentId) -> [u8; 32] {
    let mut record = [0; 32];
    let (head, tail) = record.split_at_mut(16);
    head.copy_from_slice(&request.0);
    tail.copy_from_slice(id.bytes());
    record
}

pub fn read_created(bytes: &[u8]) -> Result<(RequestHash, PaymentId), StoreError> {
    let bytes: &[u8; 32] =
        bytes.try_into().map_err(|_| StoreError::Corrupt("key: not 32 bytes".to_owned()))?;
    let (request, id) = bytes.split_at(16);
    let half = |part: &[u8]| part.try_into().expect("16 of 32 bytes");
    Ok((RequestHash(half(request)), PaymentId::from_bytes(half(id))))
}

pub fn reply(request: RequestHash, at: Timestamp, reply: &[u8], bytes: &mut Vec<u8>) {
    encode(&(request, at, reply), bytes);
}

pub fn read_reply(record: &[u8]) -> Result<(RequestHash, Timestamp, Vec<u8>), StoreError> {
    decode(record, "reply")
}

/// Key in `Index`: newest first, so the id is inverted.
pub fn index_key(name: [u8; 8], id: PaymentId) -> [u8; 24] {
    let mut key = [0; 24];
    key[..8].copy_from_slice(&name);
    key[8..].copy_from_slice(&id.bytes().map(|byte| !byte));
    key
}

/// All keys of `Index` under a name, of payments from `oldest` on.
pub fn index_span(name: [u8; 8], oldest: PaymentId) -> Span {
    let key = |id| Bound::Included(index_key(name, id).to_vec());
    Span::forwards(key(PaymentId::MAX), key(oldest))
}

pub fn read_index_id(key: &[u8]) -> Result<PaymentId, StoreError> {
    let inverted: &[u8; 16] = key
        .get(8..)
        .and_then(|id| id.try_into().ok())
        .ok_or_else(|| StoreError::Corrupt("index: not 24 bytes".to_owned()))?;
    Ok(PaymentId::from_bytes(inverted.map(|byte| !byte)))
}

/// The payment that a row belongs to, where it belongs to one for as long as that lives.
pub fn payment_of(table: Table, key: &[u8], value: &[u8]) -> Option<PaymentId> {
    match table {
        Table::Payment | Table::State => id(key).ok(),
        Table::Index => read_index_id(key).ok(),
        Table::Key => read_created(value).ok().map(|(_, id)| id),
        Table::Reply
        | Table::Lapse
        | Table::Due
        | Table::Dead
        | Table::Counter
        | Table::Meta
        | Table::Kept => None,
    }
}

/// Key in `Due` and `Lapse`: a moment, then whatever lapses or wakes then.
pub fn timed_key(at: Timestamp, rest: &[u8; 16]) -> [u8; 24] {
    let mut key = [0; 24];
    key[..8].copy_from_slice(&at.ms().max(0).to_be_bytes());
    key[8..].copy_from_slice(rest);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        Text,
        card::{Brand, Expiry},
        payment::tests::payment,
        scenario::Scenario,
    };

    #[test]
    fn what_is_read_alone_is_what_the_whole_says() {
        for scenario in Scenario::ALL {
            let Payment { terms: mut whole, progress: mut changed } = payment(scenario);
            // Whatever lies before what is read.
            changed.vat = Some(90_909);
            changed.card = Some(Card {
                brand: Brand::Visa,
                first6: "424242".into(),
                last4: "4242".into(),
                digits: 16,
                expiry: Some(Expiry { month: 12, year: 2030 }),
                installment_months: 3,
                fingerprint: [7; 16],
            });
            let reason = "a reason that is longer than what lies in place".to_owned();
            let at = changed.updated_at;
            changed.refunds.push(Refund { amount: 5, vat: Some(1), reason, at });
            let mut state = Vec::new();
            progress(Revision(300), &changed, &mut state);
            assert_eq!(standing(&state), Ok(Standing::from(&changed)));
            Arc::make_mut(&mut whole).vat = Some(90_909);
            for (url, events) in [(None, false), (None, true), (Some("http://a.example/"), false)] {
                let changed = Arc::make_mut(&mut whole);
                (changed.webhook_url, changed.events) = (url.map(Text::from), events);
                let mut bytes = Vec::new();
                terms(&whole, &mut bytes);
                let head = terms_head(&bytes).expect("as it was written");
                assert_eq!((head.id, head.draws()), (whole.id, scenario.draws()));
                let created = Payment::create(Arc::clone(&whole)).progress;
                assert_eq!(head.standing().is_settled, created.is_settled());
                assert_eq!(head.standing().has_dead, created.has_dead());
            }
        }
    }
}
