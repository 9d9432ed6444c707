//! Cards: a number is checked, reduced to what may be kept, and dropped.
//!
//! Only brand, first 6, last 4, expiry, instalments and a keyed fingerprint are ever stored
//! (PCI DSS 4.0.1, 3.3.1 and 3.4.1). The type that holds a whole number can neither be printed nor
//! serialised.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Text, ids::StoreSecret, time::Timestamp, validation::Violations};

const NUMBER_DIGITS: std::ops::RangeInclusive<usize> = 12..=19;
const INSTALLMENTS_MAX: i32 = 60;

/// What of a card is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    pub brand: Brand,
    pub first6: Text,
    pub last4: Text,
    pub digits: u8,
    pub expiry: Option<Expiry>,
    pub installment_months: u8,
    pub fingerprint: [u8; 16],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expiry {
    pub month: u8,
    pub year: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Brand {
    Visa,
    Mastercard,
    Amex,
    Jcb,
    UnionPay,
    Discover,
    Diners,
    Unknown,
}

/// A card as it arrives; borrowed, so that nothing outlives the request.
pub struct CardInput<'a> {
    pub number: &'a str,
    pub expiry_month: &'a str,
    pub expiry_year: &'a str,
    pub cvv: &'a str,
    pub installment_months: i32,
}

impl fmt::Debug for CardInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CardInput(redacted)")
    }
}

impl CardInput<'_> {
    /// Checks the card and keeps what may be kept. `path` is the proto path of the message; `None`
    /// means that `found` has grown.
    pub fn check(
        &self,
        path: &str,
        now: Timestamp,
        secret: &StoreSecret,
        found: &mut Violations,
    ) -> Option<Card> {
        let digits = self.check_number(path, found);
        let expiry = self.check_expiry(path, now, found);
        if !self.cvv.is_empty() && !is_digits(self.cvv, 3..=4) {
            found.add(format!("{path}.cvv"), "must be 3 or 4 digits");
        }
        let installment_months = u8::try_from(self.installment_months)
            .ok()
            .filter(|months| i32::from(*months) <= INSTALLMENTS_MAX);
        if installment_months.is_none() {
            found.add(
                format!("{path}.installment_months"),
                format!("must be 0 to {INSTALLMENTS_MAX}"),
            );
        }
        let number = digits?;
        Some(Card {
            brand: Brand::of(number),
            first6: number[..6].into(),
            last4: number[number.len() - 4..].into(),
            digits: u8::try_from(number.len()).expect("at most 19 digits were let through"),
            expiry: expiry?,
            installment_months: installment_months?,
            fingerprint: secret.tag(b"card", &[number.as_bytes()]),
        })
    }

    fn check_number(&self, path: &str, found: &mut Violations) -> Option<&str> {
        let field = || format!("{path}.card_number");
        if !is_digits(self.number, NUMBER_DIGITS) {
            // The value is not repeated: a mistyped card number is a card number.
            found.add(field(), "must be 12 to 19 digits without spaces or dashes");
            return None;
        }
        if !luhn(self.number) {
            found.add(field(), "fails the Luhn check (ISO/IEC 7812-1)");
            return None;
        }
        Some(self.number)
    }

    /// `Some(None)`: no expiry was given, which is allowed.
    fn check_expiry(
        &self,
        path: &str,
        now: Timestamp,
        found: &mut Violations,
    ) -> Option<Option<Expiry>> {
        if self.expiry_month.is_empty() && self.expiry_year.is_empty() {
            return Some(None);
        }
        let month = parse_digits(self.expiry_month, 1..=2).filter(|m| (1..=12).contains(m));
        if month.is_none() {
            found.add(format!("{path}.expiry_month"), "must be \"1\" to \"12\"");
        }
        let year = match self.expiry_year.len() {
            2 => parse_digits(self.expiry_year, 2..=2).map(|y| 2000 + y),
            _ => parse_digits(self.expiry_year, 4..=4).filter(|y| (2000..=2099).contains(y)),
        };
        if year.is_none() {
            found.add(format!("{path}.expiry_year"), "must be \"YY\" or \"YYYY\" (2000 to 2099)");
        }
        let (month, year) = (month?, year?);
        let today = jiff::Timestamp::from_millisecond(now.ms())
            .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
            .to_zoned(jiff::tz::TimeZone::UTC)
            .date();
        let this_month = (i32::from(today.year()), i32::from(today.month()));
        if (i32::from(year), i32::from(month)) < this_month {
            found.add(format!("{path}.expiry_year"), "the card has expired");
            return None;
        }
        let month = u8::try_from(month).expect("a month is at most 12");
        Some(Some(Expiry { month, year }))
    }
}

impl Card {
    /// First 6 and last 4, the rest as stars (PCI DSS 4.0.1, 3.4.1).
    pub fn masked_number(&self) -> String {
        let stars = usize::from(self.digits).saturating_sub(self.first6.len() + self.last4.len());
        format!("{}{}{}", self.first6, "*".repeat(stars), self.last4)
    }
}

impl Brand {
    fn of(number: &str) -> Self {
        let head = |digits: usize| number[..digits].parse::<u32>().unwrap_or(0);
        match (head(1), head(2), head(4)) {
            (4, ..) => Self::Visa,
            (_, 51..=55, _) | (.., 2221..=2720) => Self::Mastercard,
            (_, 34 | 37, _) => Self::Amex,
            (.., 3528..=3589) => Self::Jcb,
            (_, 62, _) => Self::UnionPay,
            (.., 6011) | (_, 64 | 65, _) => Self::Discover,
            (_, 36 | 38 | 39, _) => Self::Diners,
            _ => Self::Unknown,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Visa => "visa",
            Self::Mastercard => "mastercard",
            Self::Amex => "amex",
            Self::Jcb => "jcb",
            Self::UnionPay => "unionpay",
            Self::Discover => "discover",
            Self::Diners => "diners",
            Self::Unknown => "unknown",
        }
    }
}

fn is_digits(text: &str, len: std::ops::RangeInclusive<usize>) -> bool {
    len.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit())
}

fn parse_digits(text: &str, len: std::ops::RangeInclusive<usize>) -> Option<u16> {
    is_digits(text, len).then(|| text.parse().ok()).flatten()
}

fn luhn(digits: &str) -> bool {
    let sum: u32 = digits
        .bytes()
        .rev()
        .enumerate()
        .map(|(place, byte)| {
            let digit = u32::from(byte - b'0');
            match (place % 2, digit * 2) {
                (0, _) => digit,
                (_, doubled) if doubled > 9 => doubled - 9,
                (_, doubled) => doubled,
            }
        })
        .sum();
    sum.is_multiple_of(10)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_ms(1_767_225_600_000); // 2026-01-01T00:00:00Z

    fn check(number: &str, month: &str, year: &str, cvv: &str) -> Result<Card, Vec<String>> {
        let mut found = Violations::default();
        let input = CardInput {
            number,
            expiry_month: month,
            expiry_year: year,
            cvv,
            installment_months: 3,
        };
        let card = input.check("c", NOW, &StoreSecret::new([9; 32]), &mut found);
        match found.into_result() {
            Ok(()) => Ok(card.unwrap()),
            Err(bad) => Err(bad.into_iter().map(|v| v.field).collect()),
        }
    }

    #[test]
    fn a_good_card_keeps_only_what_may_be_kept() {
        let card = check("4242424242424242", "01", "26", "123").unwrap();
        assert_eq!(card.masked_number(), "424242******4242");
        assert_eq!((card.brand, card.installment_months), (Brand::Visa, 3));
        assert_eq!(card.expiry, Some(Expiry { month: 1, year: 2026 }));
        assert!(!format!("{card:?}").contains("4242424242424242"));
    }

    #[test]
    fn brands_follow_the_number() {
        for (number, brand) in [
            ("5555555555554444", Brand::Mastercard),
            ("2223003122003222", Brand::Mastercard),
            ("378282246310005", Brand::Amex),
            ("3566002020360505", Brand::Jcb),
            ("6200000000000005", Brand::UnionPay),
            ("6011111111111117", Brand::Discover),
            ("36227206271667", Brand::Diners),
        ] {
            assert_eq!(check(number, "", "", "").unwrap().brand, brand, "{number}");
        }
    }

    #[test]
    fn every_fault_of_a_card_is_named_at_once() {
        assert_eq!(
            check("4242424242424241", "13", "1999", "12"),
            Err(vec![
                "c.card_number".into(),
                "c.expiry_month".into(),
                "c.expiry_year".into(),
                "c.cvv".into()
            ])
        );
        assert_eq!(check("4242 4242", "1", "26", ""), Err(vec!["c.card_number".into()]));
        assert_eq!(check("4242424242424242", "12", "25", ""), Err(vec!["c.expiry_year".into()]));
        assert_eq!(check("4242424242424242", "1", "", ""), Err(vec!["c.expiry_year".into()]));
    }
}
