//! Pure code: no async, no clock, no I/O, no logging. Time and chance come in as arguments.

pub mod card;
pub mod deliveries;
pub mod delivery;
pub mod event;
pub mod ids;
pub mod money;
pub mod origin;
pub mod payment;
pub mod refund;
pub mod scenario;
pub mod signature;
pub mod status;
pub mod time;
pub mod timeline;
pub mod validation;

/// A short text lies in place, as most of a payment's do: whoever makes, reads or drops one looks nowhere else.
pub type Text = compact_str::CompactString;
