//! Refunds: how much of a payment may still go back, and which part of it is VAT.

use serde::{Deserialize, Serialize};

use super::time::Timestamp;

/// A payment has at most so many refunds; each is stored with it and notified.
pub const REFUNDS_MAX: usize = 100;

/// Value added tax is a tenth of the price, so an eleventh of the total (Korea).
const VAT_SHARE: u64 = 11;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refund {
    pub amount: u64,
    pub vat: Option<u64>,
    pub reason: String,
    pub at: Timestamp,
}

/// What is left of a payment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    pub amount: u64,
    /// `None`: the payment carries no VAT.
    pub vat: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefundError {
    /// More than what is left.
    Exceeds,
    /// More VAT than what is left, or than the refund itself.
    VatExceeds,
    /// More VAT than amount would be left over.
    VatRemains,
    /// The payment has no VAT to give back.
    NoVat,
}

impl Remaining {
    pub fn of(amount: u64, vat: Option<u64>, refunds: &[Refund]) -> Self {
        let refunded: u64 = refunds.iter().map(|r| r.amount).sum();
        let refunded_vat: u64 = refunds.iter().filter_map(|r| r.vat).sum();
        Self {
            amount: amount.saturating_sub(refunded),
            vat: vat.map(|vat| vat.saturating_sub(refunded_vat)),
        }
    }

    /// Splits the next refund into (amount, VAT). `amount` absent: all that is left; `vat` absent: an
    /// eleventh, and the whole rest of it when the refund takes the rest of the payment.
    pub fn take(
        self,
        amount: Option<u64>,
        vat: Option<u64>,
    ) -> Result<(u64, Option<u64>), RefundError> {
        let amount = amount.unwrap_or(self.amount);
        if amount > self.amount || amount == 0 {
            return Err(RefundError::Exceeds);
        }
        let Some(vat_left) = self.vat else {
            return if vat.is_some() { Err(RefundError::NoVat) } else { Ok((amount, None)) };
        };
        let share = vat.unwrap_or_else(|| match amount == self.amount {
            true => vat_left,
            false => vat_of(amount).min(vat_left),
        });
        if share > vat_left || share > amount {
            return Err(RefundError::VatExceeds);
        }
        if vat_left - share > self.amount - amount {
            return Err(RefundError::VatRemains);
        }
        Ok((amount, Some(share)))
    }
}

/// An eleventh, rounded to the nearest (1000 → 91).
pub const fn vat_of(amount: u64) -> u64 {
    (amount + VAT_SHARE / 2) / VAT_SHARE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks a payment through refunds of (amount, VAT) and the rest expected after each; `None`: refused.
    type Step = (u64, Option<u64>, Option<(u64, u64)>);

    fn walk(amount: u64, vat: u64, steps: &[Step]) {
        let mut left = Remaining { amount, vat: Some(vat) };
        for (amount, vat, rest) in steps {
            match (left.take(Some(*amount), *vat), rest) {
                (Ok((taken, share)), Some((amount_left, vat_left))) => {
                    left.amount -= taken;
                    left.vat = left.vat.map(|v| v - share.unwrap());
                    assert_eq!((left.amount, left.vat), (*amount_left, Some(*vat_left)));
                }
                (Err(_), None) => {}
                (got, wanted) => panic!("{amount}({vat:?}): {got:?}, wanted {wanted:?}"),
            }
        }
    }

    /// The three published cases of the sister system (seed 004).
    #[test]
    fn published_cases_hold() {
        walk(
            11_000,
            1_000,
            &[
                (1_100, Some(100), Some((9_900, 900))),
                (3_300, None, Some((6_600, 600))),
                (7_000, None, None),
                (6_600, Some(700), None),
                (6_600, Some(600), Some((0, 0))),
                (100, None, None),
            ],
        );
        walk(
            20_000,
            909,
            &[
                (10_000, Some(0), Some((10_000, 909))),
                (10_000, Some(0), None),
                (10_000, Some(909), Some((0, 0))),
            ],
        );
        walk(
            20_000,
            1_818,
            &[
                (10_000, Some(1_000), Some((10_000, 818))),
                (10_000, Some(909), None),
                (10_000, None, Some((0, 0))),
            ],
        );
    }

    #[test]
    fn without_vat_there_is_only_the_ceiling() {
        let left = Remaining::of(100, None, &[]);
        assert_eq!(left.take(None, None), Ok((100, None)));
        assert_eq!(left.take(Some(101), None), Err(RefundError::Exceeds));
        assert_eq!(left.take(Some(1), Some(1)), Err(RefundError::NoVat));
    }

    #[test]
    fn vat_rounds_to_the_nearest() {
        assert_eq!((vat_of(1_000), vat_of(15_000), vat_of(5), vat_of(6)), (91, 1_364, 0, 1));
    }
}
