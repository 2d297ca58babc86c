//! Codes of a cache: 32 elements of a key or a value share a scale, `x = scale · code`.
//!
//! Keys are turned before (Hadamard, as arXiv:2404.00456 does), queries alike, which leaves their
//! product as it is: Qwen2's keys have a few large channels, which would take the range of the others.

use half::bf16;

/// Elements that share a scale; rows are padded with zeros to whole groups.
pub(crate) const GROUP: usize = 32;

/// The bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// -127..=127.
    Eight,
    /// -8..=7.
    Four,
}

impl Bits {
    pub(crate) const fn count(self) -> usize {
        match self {
            Self::Eight => 8,
            Self::Four => 4,
        }
    }

    /// The lowest and the highest code.
    pub(crate) const fn range(self) -> (f32, f32) {
        match self {
            Self::Eight => (-127.0, 127.0),
            Self::Four => (-8.0, 7.0),
        }
    }

    /// Words of 32 bits for the codes of `width` elements.
    pub(crate) const fn words(self, width: usize) -> usize {
        width * self.count() / 32
    }

    /// Bytes of a key or a value of `head_dim` elements with its scales.
    pub(crate) const fn row_bytes(self, head_dim: usize) -> usize {
        let width = padded(head_dim);
        width * self.count() / 8 + width / GROUP * size_of::<bf16>()
    }
}

/// `head_dim` in whole groups.
pub(crate) const fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(GROUP)
}

/// Multiplies each group by the Hadamard matrix of order 32 over `√32`, which is its own inverse.
#[cfg(feature = "cpu")]
pub(crate) fn turn(row: &mut [f32]) {
    let scale = 1.0 / (GROUP as f32).sqrt();
    for group in row.chunks_exact_mut(GROUP) {
        let mut half = 1;
        while half < GROUP {
            for pair in group.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        for x in group {
            *x *= scale;
        }
    }
}

/// The codes of a group and their scale.
#[cfg(feature = "cpu")]
pub(crate) fn encode(bits: Bits, group: &[f32; GROUP]) -> ([i8; GROUP], bf16) {
    let (low, high) = bits.range();
    let most = group.iter().fold(0.0_f32, |most, x| most.max(*x));
    let least = group.iter().fold(0.0_f32, |least, x| least.min(*x));
    // The element that is largest gets the end of the range that reaches further.
    let extreme = if most > -least { most } else { least };
    let scale = bf16::from_f32(match bits {
        Bits::Eight => extreme.abs() / high,
        Bits::Four => extreme / low,
    });
    // A NaN or an infinity makes the scale NaN, and with it whatever reads the group.
    let scale = if group.iter().all(|x| x.is_finite()) {
        scale
    } else {
        bf16::NAN
    };
    let factor = scale.to_f32();
    let codes = group.map(|x| {
        let code = if factor == 0.0 { 0.0 } else { x / factor };
        code.round_ties_even().clamp(low, high) as i8
    });
    (codes, scale)
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;

    fn wave(f: f32) -> [f32; GROUP] {
        std::array::from_fn(|i| (i as f32 * f).sin() * 3.0)
    }

    #[test]
    fn codes_are_within_half_a_step_of_what_they_stand_for() {
        for bits in [Bits::Eight, Bits::Four] {
            for group in [
                wave(0.7),
                wave(0.31).map(|x| x - 2.9),
                wave(1.3).map(|x| x * 1e-30),
            ] {
                let (codes, scale) = encode(bits, &group);
                let scale = scale.to_f32();
                for (code, x) in codes.into_iter().zip(group) {
                    // The scale is rounded by up to 2^-9 of itself, and four bits end at 7 of 8.
                    let end =
                        f32::from(code) == bits.range().1 || f32::from(code) == bits.range().0;
                    let allowed = if end { 1.02 } else { 0.5001 };
                    assert!(
                        (f32::from(code) * scale - x).abs() <= allowed * scale.abs(),
                        "{bits:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_encodes_as_nothing_and_what_is_not_finite_stays_so() {
        let zero = encode(Bits::Four, &[0.0; GROUP]);
        assert_eq!((zero.0, zero.1.to_f32()), ([0; GROUP], 0.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut group = wave(0.7);
            group[5] = bad;
            assert!(encode(Bits::Eight, &group).1.is_nan());
        }
    }

    #[test]
    fn turning_twice_changes_nothing_and_once_spreads_a_peak() {
        let mut row = [0.0; 2 * GROUP];
        row[3] = 8.0;
        row[40] = -1.0;
        let before = row;
        turn(&mut row);
        let peak = row[..GROUP]
            .iter()
            .fold(0.0_f32, |most, x| most.max(x.abs()));
        assert!((peak - 8.0 / 32.0_f32.sqrt()).abs() < 1e-6);
        turn(&mut row);
        for (a, b) in row.iter().zip(before) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}
