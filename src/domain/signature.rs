//! Webhook signatures: the header of the first system, and Standard Webhooks 1.0.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

const STANDARD_PREFIX: &str = "whsec_";
const MAC_BYTES: usize = 32;
/// `v1,`, the base64 of a MAC, and a space before the next.
const SIGNATURE_CHARS: usize = 48;

/// The live secrets, newest first, keyed once.
#[derive(Clone)]
pub struct Signer {
    /// Keyed with the newest secret's whole text, as existing receivers expect.
    legacy: Hmac<Sha256>,
    /// One for each secret: the base64 after `whsec_`, else the literal text.
    standard: Vec<Hmac<Sha256>>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({} secrets, redacted)", self.standard.len())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    #[error("no secret is given")]
    None,
    #[error("a secret that starts with whsec_ must go on in base64")]
    NotBase64,
}

impl Signer {
    /// `secrets` newest first.
    pub fn new<S: AsRef<str>>(secrets: &[S]) -> Result<Self, SecretError> {
        let newest = secrets.first().ok_or(SecretError::None)?.as_ref();
        let standard = secrets.iter().map(|s| standard_key(s.as_ref()).map(|key| mac(&key)));
        Ok(Self { legacy: mac(newest.as_bytes()), standard: standard.collect::<Result<_, _>>()? })
    }

    /// `X-Webhook-Signature`: `sha256=` and the hex HMAC-SHA256 of the body (seed 003).
    pub fn legacy(&self, body: &[u8]) -> String {
        let mut digits = [0; 2 * MAC_BYTES];
        hex::encode_to_slice(finish(&self.legacy, &[body]), &mut digits)
            .expect("two digits a byte");
        ["sha256=", str::from_utf8(&digits).expect("digits are ASCII")].concat()
    }

    /// `webhook-signature`: `v1,<base64>` for each live secret, over `id.timestamp.body`.
    pub fn standard(&self, id: &str, timestamp_s: i64, body: &[u8]) -> String {
        let seconds = timestamp_s.to_string();
        let parts = [id.as_bytes(), b".", seconds.as_bytes(), b".", body];
        let mut signatures = String::with_capacity(self.standard.len() * SIGNATURE_CHARS);
        for key in &self.standard {
            if !signatures.is_empty() {
                signatures.push(' ');
            }
            signatures.push_str("v1,");
            STANDARD.encode_string(finish(key, &parts), &mut signatures);
        }
        signatures
    }
}

fn standard_key(secret: &str) -> Result<Vec<u8>, SecretError> {
    match secret.strip_prefix(STANDARD_PREFIX) {
        Some(encoded) => STANDARD.decode(encoded).map_err(|_| SecretError::NotBase64),
        None => Ok(secret.as_bytes().to_vec()),
    }
}

fn mac(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes a key of any length")
}

fn finish(key: &Hmac<Sha256>, parts: &[&[u8]]) -> [u8; MAC_BYTES] {
    let mut mac = key.clone();
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;

    /// The vector that the Standard Webhooks libraries test themselves with.
    #[test]
    fn the_published_vector_holds() {
        let signer = Signer::new(&[SECRET]).unwrap();
        assert_eq!(
            signer.standard("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, BODY),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn a_rotation_signs_with_every_secret_and_the_old_header_with_the_newest() {
        let both = Signer::new(&["new", SECRET]).unwrap();
        let old = Signer::new(&[SECRET]).unwrap();
        let new = Signer::new(&["new"]).unwrap();
        let signatures = both.standard("id", 1, BODY);
        assert_eq!(
            signatures,
            format!("{} {}", new.standard("id", 1, BODY), old.standard("id", 1, BODY))
        );
        assert_eq!(both.legacy(BODY), new.legacy(BODY));
    }

    #[test]
    fn bad_secrets_are_refused_and_good_ones_not_printed() {
        assert_eq!(Signer::new(&["whsec_***"]).unwrap_err(), SecretError::NotBase64);
        assert_eq!(Signer::new::<&str>(&[]).unwrap_err(), SecretError::None);
        assert!(!format!("{:?}", Signer::new(&["hush"]).unwrap()).contains("hush"));
    }
}
