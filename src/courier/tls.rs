//! Whom the couriers trust: the machine's root certificates.

use std::sync::{Arc, LazyLock};

use hyper_rustls::ConfigBuilderExt;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier, crypto::ring};

/// Read once: it takes tens of milliseconds, and several couriers want it. `None` where the machine has
/// none, as a bare container.
static NATIVE: LazyLock<Option<ClientConfig>> =
    LazyLock::new(|| match builder().with_native_roots() {
        Ok(with_roots) => Some(with_roots.with_no_client_auth()),
        Err(error) => {
            tracing::warn!(%error, "no root certificates: https will fail, http works");
            None
        }
    });

/// Without root certificates plain http still works; every https attempt fails as TLS.
pub fn with_native_roots() -> ClientConfig {
    NATIVE.clone().unwrap_or_else(|| with_roots(RootCertStore::empty()))
}

pub fn has_native_roots() -> bool {
    NATIVE.is_some()
}

pub fn with_roots(roots: RootCertStore) -> ClientConfig {
    builder().with_root_certificates(roots).with_no_client_auth()
}

/// Names its provider, so that it does not depend on which others are compiled in.
fn builder() -> ConfigBuilder<ClientConfig, WantsVerifier> {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the cipher suites of TLS 1.2 and 1.3")
}
