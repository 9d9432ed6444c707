//! Amounts in the smallest unit of an ISO 4217 currency.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The least and the most that one payment may be, in the currency's smallest unit.
pub const AMOUNT_MIN: u64 = 1;
pub const AMOUNT_MAX: u64 = 1_000_000_000_000;

/// An ISO 4217 code.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Currency([u8; 3]);

impl Currency {
    /// Reads an alphabetic code in upper case, as ISO 4217 writes it.
    pub fn parse(code: &str) -> Option<Self> {
        iso_currency::Currency::from_code(code)?;
        Some(Self(code.as_bytes().try_into().ok()?))
    }

    pub fn code(&self) -> &str {
        std::str::from_utf8(&self.0).expect("only codes from the ISO 4217 table get in")
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Money {
    pub amount: u64,
    pub currency: Currency,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_of_the_table_are_currencies() {
        for code in ["KRW", "JPY", "USD", "BHD"] {
            assert_eq!(Currency::parse(code).map(|c| c.code().to_owned()).as_deref(), Some(code));
        }
        for code in ["krw", "KR", "", "KRWX", "ZZZ", "₩"] {
            assert_eq!(Currency::parse(code), None, "{code}");
        }
    }
}
