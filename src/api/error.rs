//! Everything that a caller can be refused with, in one table: reason, gRPC code, when to try again.
//!
//! A refusal becomes a gRPC status with google.rpc details here and nowhere else, so that no internal
//! text reaches a caller and every reply fits a client's header limit.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::domain::validation::Violation;

/// `ErrorInfo.domain` of every error.
pub const DOMAIN: &str = "payment-sim";

/// Longest grpc-message, in bytes as sent (percent-encoded). With the limits below a whole refusal
/// stays under the 8 KiB that the strictest clients take as headers.
pub const MAX_MESSAGE_BYTES: usize = 1024;

/// Violations listed; one more entry tells how many were left out.
pub const MAX_VIOLATIONS: usize = 20;

/// Longest field path and description of one violation, in bytes: 20 × (48 + 128) and the message once
/// more are 6 KiB in base64. The longest path that we have is 46 bytes.
const MAX_FIELD_BYTES: usize = 48;
const MAX_DESCRIPTION_BYTES: usize = 128;

/// Longest value in `ErrorInfo.metadata`, in bytes.
const MAX_METADATA_BYTES: usize = 128;

/// What ends a text that was cut.
const ELLIPSIS: &str = "...";

/// When to try again after an overload: 8,192 requests in flight are served in 0.3 s.
const RETRY_OVERLOADED: Duration = Duration::from_millis(500);

/// When to try again on a full disk: free space is read once a second and needs somebody's hand.
const RETRY_STORE_FULL: Duration = Duration::from_secs(5);

/// When to try again on an unavailable store or a draining server: another replica, or this one
/// restarted, is there within seconds.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    ValidationFailed,
    PaymentNotFound,
    IdempotencyConflict,
    InvalidState,
    NoWebhookUrl,
    RefundExceedsRemaining,
    NotYours,
    Overloaded,
    StoreFull,
    StoreUnavailable,
    Draining,
    Deadline,
    Malformed,
    MessageTooLarge,
    TokenRequired,
    /// A bug of ours.
    Internal,
}

/// One row of the table.
struct Row {
    name: &'static str,
    code: Code,
    /// Sent as RetryInfo; `None` where trying again does not help.
    retry: Option<Duration>,
}

impl Reason {
    /// Every reason, in the table's order.
    pub const ALL: [Self; 16] = [
        Self::ValidationFailed,
        Self::PaymentNotFound,
        Self::IdempotencyConflict,
        Self::InvalidState,
        Self::NoWebhookUrl,
        Self::RefundExceedsRemaining,
        Self::NotYours,
        Self::Overloaded,
        Self::StoreFull,
        Self::StoreUnavailable,
        Self::Draining,
        Self::Deadline,
        Self::Malformed,
        Self::MessageTooLarge,
        Self::TokenRequired,
        Self::Internal,
    ];

    const fn row(self) -> Row {
        const fn row(name: &'static str, code: Code, retry: Option<Duration>) -> Row {
            Row { name, code, retry }
        }
        match self {
            Self::ValidationFailed => row("VALIDATION_FAILED", Code::InvalidArgument, None),
            Self::PaymentNotFound => row("PAYMENT_NOT_FOUND", Code::NotFound, None),
            Self::IdempotencyConflict => row("IDEMPOTENCY_CONFLICT", Code::AlreadyExists, None),
            Self::InvalidState => row("INVALID_STATE", Code::FailedPrecondition, None),
            Self::NoWebhookUrl => row("NO_WEBHOOK_URL", Code::FailedPrecondition, None),
            Self::RefundExceedsRemaining => {
                row("REFUND_EXCEEDS_REMAINING", Code::FailedPrecondition, None)
            }
            Self::NotYours => row("NOT_YOURS", Code::PermissionDenied, None),
            Self::Overloaded => row("OVERLOADED", Code::ResourceExhausted, Some(RETRY_OVERLOADED)),
            Self::StoreFull => row("STORE_FULL", Code::ResourceExhausted, Some(RETRY_STORE_FULL)),
            Self::StoreUnavailable => {
                row("STORE_UNAVAILABLE", Code::Unavailable, Some(RETRY_UNAVAILABLE))
            }
            Self::Draining => row("DRAINING", Code::Unavailable, Some(RETRY_UNAVAILABLE)),
            Self::Deadline => row("DEADLINE", Code::DeadlineExceeded, None),
            Self::Malformed => row("MALFORMED", Code::InvalidArgument, None),
            Self::MessageTooLarge => row("MESSAGE_TOO_LARGE", Code::ResourceExhausted, None),
            Self::TokenRequired => row("TOKEN_REQUIRED", Code::Unauthenticated, None),
            Self::Internal => row("INTERNAL", Code::Internal, None),
        }
    }

    /// `ErrorInfo.reason`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    pub const fn code(self) -> Code {
        self.row().code
    }

    /// When to try again, unless the failure says otherwise.
    pub const fn retry_after(self) -> Option<Duration> {
        self.row().retry
    }
}

/// A refusal, before it is put into a status.
#[derive(Clone, Debug)]
pub struct Failure {
    pub reason: Reason,
    /// For the caller; never carries internal text.
    pub message: String,
    pub violations: Vec<Violation>,
    /// `ErrorInfo.metadata`, such as the current status.
    pub metadata: BTreeMap<String, String>,
    /// Overrides the table's delay.
    pub retry_after: Option<Duration>,
    /// What really happened, for the log at the boundary; never sent.
    pub cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl Failure {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            violations: Vec::new(),
            metadata: BTreeMap::new(),
            retry_after: None,
            cause: None,
        }
    }

    /// VALIDATION_FAILED for all bad fields at once; the message repeats them for people.
    pub fn invalid(violations: Vec<Violation>) -> Self {
        let listed: Vec<_> = violations
            .iter()
            .take(MAX_VIOLATIONS)
            .map(|v| format!("{}: {}", v.field, v.description))
            .collect();
        let mut failure = Self::new(Reason::ValidationFailed, listed.join("; "));
        failure.violations = violations;
        failure
    }

    /// A bug of ours: the caller learns only that; the cause goes to the log.
    pub fn internal(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let mut failure = Self::new(Reason::Internal, "internal error");
        failure.cause = Some(Arc::from(cause.into()));
        failure
    }

    /// Adds to `ErrorInfo.metadata`.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    fn details(&self) -> ErrorDetails {
        let metadata: HashMap<_, _> = self
            .metadata
            .iter()
            .map(|(key, value)| (key.clone(), clip(value, MAX_METADATA_BYTES, plain)))
            .collect();
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason.name(), DOMAIN, metadata);
        for violation in self.violations.iter().take(MAX_VIOLATIONS) {
            details.add_bad_request_violation(
                clip(&violation.field, MAX_FIELD_BYTES, plain),
                clip(&violation.description, MAX_DESCRIPTION_BYTES, plain),
            );
        }
        let left_out = self.violations.len().saturating_sub(MAX_VIOLATIONS);
        if left_out > 0 {
            details.add_bad_request_violation("", format!("and {left_out} more violations"));
        }
        if let Some(delay) = self.retry_after.or(self.reason.retry_after()) {
            details.set_retry_info(Some(delay));
        }
        details
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let message = clip(&failure.message, MAX_MESSAGE_BYTES, percent_encoded);
        let mut status =
            Status::with_error_details(failure.reason.code(), message, failure.details());
        if let Some(cause) = failure.cause {
            status.set_source(cause);
        }
        status
    }
}

/// Cuts a text so that it takes at most `limit` bytes, each character weighed by `weight`.
fn clip(text: &str, limit: usize, weight: fn(char) -> usize) -> String {
    let mut used = 0;
    let mut fits_with_ellipsis = 0;
    for (at, c) in text.char_indices() {
        if used + ELLIPSIS.len() <= limit {
            fits_with_ellipsis = at;
        }
        used += weight(c);
        if used > limit {
            return format!("{}{ELLIPSIS}", &text[..fits_with_ellipsis]);
        }
    }
    text.to_owned()
}

const fn plain(c: char) -> usize {
    c.len_utf8()
}

/// What a character takes in grpc-message: tonic writes these and everything outside ASCII as `%XX`.
fn percent_encoded(c: char) -> usize {
    if c.is_ascii_graphic() && !"\"#%<>`?{}".contains(c) { 1 } else { 3 * c.len_utf8() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(field: &str, description: &str) -> Violation {
        Violation { field: field.to_owned(), description: description.to_owned() }
    }

    fn grpc_message_bytes(status: &Status) -> usize {
        let response = status.clone().into_http::<()>();
        response.headers()["grpc-message"].len()
    }

    #[test]
    fn the_table_is_the_contracts() {
        let table: Vec<_> =
            Reason::ALL.iter().map(|r| (r.name(), r.code(), r.retry_after().is_some())).collect();
        assert_eq!(
            table,
            [
                ("VALIDATION_FAILED", Code::InvalidArgument, false),
                ("PAYMENT_NOT_FOUND", Code::NotFound, false),
                ("IDEMPOTENCY_CONFLICT", Code::AlreadyExists, false),
                ("INVALID_STATE", Code::FailedPrecondition, false),
                ("NO_WEBHOOK_URL", Code::FailedPrecondition, false),
                ("REFUND_EXCEEDS_REMAINING", Code::FailedPrecondition, false),
                ("NOT_YOURS", Code::PermissionDenied, false),
                ("OVERLOADED", Code::ResourceExhausted, true),
                ("STORE_FULL", Code::ResourceExhausted, true),
                ("STORE_UNAVAILABLE", Code::Unavailable, true),
                ("DRAINING", Code::Unavailable, true),
                ("DEADLINE", Code::DeadlineExceeded, false),
                ("MALFORMED", Code::InvalidArgument, false),
                ("MESSAGE_TOO_LARGE", Code::ResourceExhausted, false),
                ("TOKEN_REQUIRED", Code::Unauthenticated, false),
                ("INTERNAL", Code::Internal, false),
            ]
        );
    }

    #[test]
    fn every_reason_is_an_error_info_of_our_domain() {
        for reason in Reason::ALL {
            let status = Status::from(Failure::new(reason, "text").with("status", "PENDING"));
            assert_eq!(status.code(), reason.code());
            let info = status.get_details_error_info().unwrap();
            assert_eq!(info.domain, DOMAIN);
            assert_eq!(info.reason, reason.name());
            assert_eq!(info.metadata["status"], "PENDING");
            let retry = status.get_details_retry_info().and_then(|r| r.retry_delay);
            assert_eq!(retry, reason.retry_after());
        }
    }

    #[test]
    fn all_bad_fields_are_named_and_the_message_repeats_them() {
        let status = Status::from(Failure::invalid(vec![
            violation("amount.currency", "must be an ISO 4217 code"),
            violation("user_id", "is required"),
        ]));
        assert_eq!(
            status.message(),
            "amount.currency: must be an ISO 4217 code; user_id: is required"
        );
        let bad = status.get_details_bad_request().unwrap();
        assert_eq!(bad.field_violations[0].field, "amount.currency");
        assert_eq!(bad.field_violations[1].description, "is required");
    }

    #[test]
    fn past_twenty_violations_their_number_is_told() {
        let many = |n| (0..n).map(|i| violation(&format!("f{i}"), "bad")).collect();
        let listed = |n| {
            Status::from(Failure::invalid(many(n)))
                .get_details_bad_request()
                .unwrap()
                .field_violations
        };
        assert_eq!(listed(20).len(), 20);
        let past = listed(27);
        assert_eq!(past.len(), 21);
        assert_eq!(past[20].description, "and 7 more violations");
    }

    #[test]
    fn a_refusal_fits_every_clients_headers() {
        for text in ["x", "é", "결", "🙂", "%", "a b"] {
            let long = text.repeat(5000);
            let violations = (0..50).map(|_| violation(&long, &long)).collect();
            let status = Status::from(Failure::invalid(violations).with("value", &long));
            let sent = grpc_message_bytes(&status);
            assert!(sent <= MAX_MESSAGE_BYTES, "{text}: {sent}");
            assert!(status.message().ends_with(ELLIPSIS));
            let headers = status.into_http::<()>().headers().clone();
            let total: usize = headers.iter().map(|(k, v)| k.as_str().len() + v.len() + 32).sum();
            assert!(total < 8 * 1024, "{text}: {total}");
        }
    }

    #[test]
    fn a_text_that_just_fits_is_left_alone() {
        let exact = "x".repeat(MAX_MESSAGE_BYTES);
        let status = Status::from(Failure::new(Reason::InvalidState, exact.clone()));
        assert_eq!(status.message(), exact);
        let longer = Status::from(Failure::new(Reason::InvalidState, exact + "x"));
        assert_eq!(longer.message().len(), MAX_MESSAGE_BYTES);
    }

    #[test]
    fn a_bug_tells_the_caller_nothing_and_the_log_everything() {
        let status = Status::from(Failure::internal("journal at /data/7 is torn"));
        assert_eq!(status.message(), "internal error");
        assert!(!String::from_utf8_lossy(status.details()).contains("journal"));
        let cause = Error::source(&status).unwrap().to_string();
        assert_eq!(cause, "journal at /data/7 is torn");
    }
}
