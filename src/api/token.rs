//! Who may call the simulation API: everybody, or the bearers of its token where one is set.

use tonic::{Request, Status, metadata::MetadataMap, service::Interceptor};

use super::error::{Failure, Reason};
use crate::domain::ids::StoreSecret;

const HEADER: &str = "authorization";
const SCHEME: &str = "bearer";

/// Looks at a call's headers before its body is read.
#[derive(Clone)]
pub struct Guard(Option<Expected>);

/// A hash of the token, keyed with what no caller knows: how long a comparison of two such hashes takes
/// tells nothing about the token.
#[derive(Clone)]
struct Expected {
    secret: StoreSecret,
    tag: [u8; 16],
}

impl Guard {
    /// `None`: everybody may call.
    pub fn new(token: Option<&str>, secret: &StoreSecret) -> Self {
        Self(
            token.map(|token| Expected {
                secret: secret.clone(),
                tag: tag(secret, token.as_bytes()),
            }),
        )
    }

    fn admits(&self, headers: &MetadataMap) -> bool {
        let Some(expected) = &self.0 else { return true };
        let mut given = headers.get_all(HEADER).iter();
        let (Some(header), None) = (given.next(), given.next()) else { return false };
        bearer(header.as_encoded_bytes())
            .is_some_and(|token| tag(&expected.secret, token) == expected.tag)
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if self.admits(request.metadata()) {
            return Ok(request);
        }
        let text = "this API needs the request header `authorization: Bearer <SIMULATION_TOKEN>`";
        Err(Failure::new(Reason::TokenRequired, text).into())
    }
}

fn tag(secret: &StoreSecret, token: &[u8]) -> [u8; 16] {
    secret.tag(b"simulation token", &[token])
}

/// The token behind the scheme, whose name may be written in any case.
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = header.split_at_checked(SCHEME.len())?;
    let token = rest.strip_prefix(b" ")?.trim_ascii();
    scheme.eq_ignore_ascii_case(SCHEME.as_bytes()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(token: Option<&str>, headers: &[&str]) -> bool {
        let mut guard = Guard::new(token, &StoreSecret::new([7; 32]));
        let mut request = Request::new(());
        for header in headers {
            request.metadata_mut().append(HEADER, header.parse().unwrap());
        }
        guard.call(request).is_ok()
    }

    #[test]
    fn without_a_token_everybody_may_call() {
        assert!(admitted(None, &[]));
        assert!(admitted(None, &["Bearer whatever"]));
    }

    #[test]
    fn with_a_token_only_its_bearers_may() {
        for good in ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "] {
            assert!(admitted(Some("s3cret"), &[good]), "{good}");
        }
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer s3cre",
            "Bearer s3cret2",
            "Bearer S3CRET",
            "s3cret",
            "Basic s3cret",
            "Bearers3cret",
        ] {
            assert!(!admitted(Some("s3cret"), &[bad]), "{bad}");
        }
        assert!(!admitted(Some("s3cret"), &[]));
        assert!(!admitted(Some("s3cret"), &["Bearer s3cret", "Bearer other"]), "which of them?");
    }
}
