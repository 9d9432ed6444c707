//! How the AWS couriers reach AWS: profile, region and endpoint as in every AWS SDK.

use std::time::Duration;

use aws_config::{
    BehaviorVersion, Region, SdkConfig,
    environment::EnvironmentVariableRegionProvider,
    meta::region::RegionProviderChain,
    profile::{self, ProfileFileRegionProvider},
    retry::RetryConfig,
    stalled_stream_protection::StalledStreamProtectionConfig,
    timeout::TimeoutConfig,
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use aws_types::os_shim_internal::{Env, Fs};

use super::{connect::CONNECT_MAX, tls};

/// Of one HTTP request. AWS answers in well under a second, or is in trouble.
const REQUEST_MAX: Duration = Duration::from_secs(5);
/// Of a whole call, the fetching of credentials (SSO, a process, another role) included.
const CALL_MAX: Duration = Duration::from_secs(10);

/// What is `None` is looked up as in every AWS SDK: environment, then the shared files.
#[derive(Clone, Debug, Default)]
pub struct AwsSettings {
    pub profile: Option<String>,
    pub region: Option<String>,
    /// Where neither the setting nor the SDK's own places name one.
    pub default_region: String,
    pub endpoint_url: Option<String>,
}

/// Reads files and environment, once, at start; no network yet: credentials are fetched by the first call.
pub async fn sdk_config(settings: &AwsSettings) -> SdkConfig {
    let mut from_profile = ProfileFileRegionProvider::builder();
    if let Some(profile) = &settings.profile {
        from_profile = from_profile.profile_name(profile);
    }
    // The SDK's own chain but for its last link, the metadata service of EC2: asking it costs seconds on
    // every machine that is not in AWS, and we have a default.
    let region = RegionProviderChain::first_try(settings.region.clone().map(Region::new))
        .or_else(EnvironmentVariableRegionProvider::new())
        .or_else(from_profile.build())
        .or_else(Region::new(settings.default_region.clone()));
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_MAX)
        .operation_attempt_timeout(REQUEST_MAX)
        .operation_timeout(CALL_MAX)
        .build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .region(region)
        .http_client(http_client())
        // The outbox tries again, batched with what has become due meanwhile.
        .retry_config(RetryConfig::disabled())
        // A call is one small message each way, and its time is limited as a whole.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .timeout_config(timeouts);
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    if let Some(url) = &settings.endpoint_url {
        loader = loader.endpoint_url(url);
    }
    loader.load().await
}

/// Whether the shared config has this profile; files that cannot be read have none.
pub async fn has_profile(name: &str) -> bool {
    let files = Default::default();
    let profiles = profile::load(&Fs::real(), &Env::real(), &files, None).await;
    profiles.is_ok_and(|found| found.get_profile(name).is_some())
}

fn http_client() -> aws_sdk_eventbridge::config::SharedHttpClient {
    // Without root certificates the SDK's client panics in a debug build, even for an http endpoint.
    let roots = TrustStore::empty().with_native_roots(tls::has_native_roots());
    let context = TlsContext::builder()
        .with_trust_store(roots)
        .build()
        .expect("a context without certificates of its own has nothing to refuse");
    Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(context)
        .build_https()
}
