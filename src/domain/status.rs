//! What callers see of a payment's state.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Status {
    Pending,
    Processing,
    Completed,
    Failed,
    Cancelled,
    Refunded,
    Expired,
}

impl Status {
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Processing,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Refunded,
        Self::Expired,
    ];

    /// The name on the wire (`payment.v1.PaymentStatus`).
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "PAYMENT_STATUS_PENDING",
            Self::Processing => "PAYMENT_STATUS_PROCESSING",
            Self::Completed => "PAYMENT_STATUS_COMPLETED",
            Self::Failed => "PAYMENT_STATUS_FAILED",
            Self::Cancelled => "PAYMENT_STATUS_CANCELLED",
            Self::Refunded => "PAYMENT_STATUS_REFUNDED",
            Self::Expired => "PAYMENT_STATUS_EXPIRED",
        }
    }

    /// The name without its prefix, as labels and messages say it.
    pub fn short(self) -> &'static str {
        self.as_str().strip_prefix("PAYMENT_STATUS_").expect("every name has the prefix")
    }
}
