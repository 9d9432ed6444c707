//! Identifiers. One time-ordered 26-character id (a ULID) names a payment; every other id is
//! derived from it, so that nothing has to be stored to give the same answer twice.

use std::{fmt, hash::Hasher};

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use siphasher::sip128::{Hasher128, SipHasher24};
use ulid::{ULID_LEN, Ulid};

use super::time::Timestamp;

const INTENT_PREFIX: &str = "pi_";
const PAYMENT_PREFIX: &str = "pay_";
const CLIENT_SECRET_CHARS: usize = 24;
const APPROVAL_NO_MODULUS: u64 = 10_000_000_000;

/// The id of a payment: 48 bits of Unix milliseconds, then 80 bits that are unique. The default is smaller
/// than any that is made.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PaymentId([u8; 16]);

impl PaymentId {
    /// None is larger.
    pub const MAX: Self = Self([0xff; 16]);

    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    pub const fn bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// `unique` fills the lower 80 bits; its upper 48 bits are ignored.
    pub const fn from_parts(at: Timestamp, unique: u128) -> Self {
        Self(Ulid::from_parts(at.ms().unsigned_abs(), unique).to_bytes())
    }

    /// The smallest id that can be made at `at`: ids below it are older.
    pub const fn floor(at: Timestamp) -> Self {
        Self::from_parts(at, 0)
    }

    /// The id right above it.
    #[must_use]
    pub const fn next(&self) -> Self {
        Self(u128::from_be_bytes(self.0).saturating_add(1).to_be_bytes())
    }

    /// The moment that the id was made.
    pub const fn made_at(&self) -> Timestamp {
        Timestamp::from_ms(Ulid::from_bytes(self.0).timestamp_ms().cast_signed())
    }

    /// Reads `pi_…` or `pay_…`: every call that takes one takes either.
    pub fn parse(text: &str) -> Option<Self> {
        let body =
            text.strip_prefix(INTENT_PREFIX).or_else(|| text.strip_prefix(PAYMENT_PREFIX))?;
        Self::parse_bare(body)
    }

    /// Reads the 26 characters without a prefix.
    pub fn parse_bare(body: &str) -> Option<Self> {
        let ulid = Ulid::from_string(body).ok()?;
        // Crockford's alphabet has aliases (I for 1, lower case): one payment has one spelling.
        (ulid.to_string() == body).then(|| Self(ulid.to_bytes()))
    }

    /// The 26 characters without a prefix.
    pub fn bare(&self) -> String {
        Ulid::from_bytes(self.0).to_string()
    }

    pub fn intent(&self) -> String {
        self.spelled(INTENT_PREFIX, "")
    }

    pub fn payment(&self) -> String {
        self.spelled(PAYMENT_PREFIX, "")
    }

    /// In one allocation: every reply has several of these.
    fn spelled(&self, prefix: &str, rest: &str) -> String {
        let mut characters = [0; ULID_LEN];
        let characters: &str = Ulid::from_bytes(self.0).array_to_str(&mut characters);
        [prefix, characters, rest].concat()
    }

    pub fn transaction(&self) -> String {
        self.spelled("txn_", "")
    }

    pub fn event(&self, n: u32) -> String {
        format!("evt_{self}_{n}")
    }

    pub fn refund(&self, n: usize) -> String {
        format!("re_{self}_{n}")
    }

    /// `AP` and 10 digits, spread evenly over the ids.
    pub fn approval_no(&self) -> String {
        let digest = Sha256::digest(self.0);
        let mut head = [0; 8];
        head.copy_from_slice(&digest[..8]);
        format!("AP{:010}", u64::from_be_bytes(head) % APPROVAL_NO_MODULUS)
    }

    /// `pi_…_secret_` and 24 characters that only the holder of `secret` can make.
    pub fn client_secret(&self, secret: &StoreSecret) -> String {
        const INFIX: &str = "_secret_";
        let hash = secret.hash(b"client_secret", &[&self.0]);
        let mut rest = [0; INFIX.len() + CLIENT_SECRET_CHARS];
        let (infix, characters) = rest.split_at_mut(INFIX.len());
        infix.copy_from_slice(INFIX.as_bytes());
        hex::encode_to_slice(&hash[..CLIENT_SECRET_CHARS / 2], characters)
            .expect("a byte is two characters");
        self.spelled(INTENT_PREFIX, std::str::from_utf8(&rest).expect("all of it is ASCII"))
    }
}

impl fmt::Display for PaymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Ulid::from_bytes(self.0), f)
    }
}

impl fmt::Debug for PaymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The key that a store is born with: it keys every hash that is stored, so that a copy of the
/// hashes tells nothing of what went in. A purpose keeps hashes of different things apart.
#[derive(Clone)]
pub struct StoreSecret {
    bytes: [u8; 32],
    /// HMAC with its key taken in, which is half the work of a short tag.
    keyed: Hmac<Sha256>,
    /// `None`: what is looked up is hashed by HMAC too.
    quick: Option<SipHasher24>,
}

impl StoreSecret {
    pub fn new(bytes: [u8; 32]) -> Self {
        let tags_alone = Self::of_an_older_store(bytes);
        let key = tags_alone.tag(b"siphash", &[]);
        Self { quick: Some(SipHasher24::new_with_key(&key)), ..tags_alone }
    }

    /// Of a store that was made when there were no quick hashes: its rows would not be found by them.
    pub fn of_an_older_store(bytes: [u8; 32]) -> Self {
        let keyed = Hmac::new_from_slice(&bytes).expect("HMAC takes a key of any length");
        Self { bytes, keyed, quick: None }
    }

    pub const fn bytes(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// For what each payment needs, to be looked up, compared or given to its caller: SipHash-2-4 of 128 bits, a fifth
    /// of what a tag costs.
    pub fn hash(&self, purpose: &[u8], parts: &[&[u8]]) -> [u8; 16] {
        let Some(mut hasher) = self.quick else { return self.tag(purpose, parts) };
        each_part(purpose, parts, |bytes| hasher.write(bytes));
        hasher.finish128().as_bytes()
    }

    /// For what stands for a card, and for the simulation API's token: HMAC-SHA256, cut.
    pub fn tag(&self, purpose: &[u8], parts: &[&[u8]]) -> [u8; 16] {
        let mut mac = self.keyed.clone();
        each_part(purpose, parts, |bytes| mac.update(bytes));
        let mut tag = [0; 16];
        tag.copy_from_slice(&mac.finalize().into_bytes()[..16]);
        tag
    }
}

/// Each part behind its length, so that no two lists of parts look alike.
fn each_part(purpose: &[u8], parts: &[&[u8]], mut take: impl FnMut(&[u8])) {
    for part in std::iter::once(&purpose).chain(parts) {
        take(&(part.len() as u64).to_be_bytes());
        take(part);
    }
}

impl fmt::Debug for StoreSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreSecret(redacted)")
    }
}

/// Keyed hash of an idempotency key with its scope (session and RPC).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct KeyHash(pub [u8; 16]);

/// Keyed hash of a request without its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestHash(pub [u8; 16]);

/// An idempotency key as it is compared and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idempotency {
    pub key: KeyHash,
    pub request: RequestHash,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> PaymentId {
        PaymentId::from_parts(Timestamp::from_ms(1_767_225_600_123), 42)
    }

    #[test]
    fn either_prefix_names_the_same_payment() {
        assert_eq!(PaymentId::parse(&id().intent()), Some(id()));
        assert_eq!(PaymentId::parse(&id().payment()), Some(id()));
        assert_eq!(id().bare().len(), 26);
        assert_eq!(id().made_at().ms(), 1_767_225_600_123);
    }

    #[test]
    fn other_spellings_are_refused() {
        let text = id().intent();
        for wrong in [&text[3..], &text.to_lowercase(), "pi_", "", &text[..20], "txn_01"] {
            assert_eq!(PaymentId::parse(wrong), None, "{wrong}");
        }
        assert_eq!(PaymentId::parse(&format!("pi_{}", "Z".repeat(26))), None);
        assert_eq!(PaymentId::parse("pi_é123456789012345678901234"), None);
    }

    #[test]
    fn derived_ids_have_the_contracts_shape() {
        let approval = id().approval_no();
        assert_eq!(approval.len(), 12);
        assert!(approval.starts_with("AP") && approval[2..].bytes().all(|b| b.is_ascii_digit()));
        let secret = id().client_secret(&StoreSecret::new([7; 32]));
        let tail = secret.strip_prefix(&format!("{}_secret_", id().intent())).map(str::len);
        assert_eq!(tail, Some(24));
        assert_eq!(id().event(3), format!("evt_{}_3", id().bare()));
    }

    #[test]
    fn tags_and_hashes_depend_on_key_purpose_and_the_cut_between_parts() {
        let (secret, other) = (StoreSecret::new([1; 32]), StoreSecret::new([2; 32]));
        for of in [StoreSecret::tag, StoreSecret::hash] {
            let tag = of(&secret, b"p", &[b"ab", b"c"]);
            assert_eq!(tag, of(&secret.clone(), b"p", &[b"ab", b"c"]));
            assert_ne!(tag, of(&secret, b"p", &[b"a", b"bc"]));
            assert_ne!(tag, of(&secret, b"q", &[b"ab", b"c"]));
            assert_ne!(tag, of(&other, b"p", &[b"ab", b"c"]));
        }
    }

    /// They are in the files: the same for ever, on every machine. The figures are another implementation's.
    #[test]
    fn hashes_stay_what_they_are() {
        let bytes = std::array::from_fn(|i| u8::try_from(i).unwrap());
        let hash =
            |secret: StoreSecret| hex::encode(secret.hash(b"key", &[b"", b"Create", b"k-1"]));
        assert_eq!(hash(StoreSecret::new(bytes)), "cb3d0ee77dfc813ddb001a639b71eeae");
        let older = StoreSecret::of_an_older_store(bytes);
        assert_eq!(hash(older), "028d40a5ce13153114fd3abeb7cfa188");
    }
}
