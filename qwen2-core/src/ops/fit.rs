//! The scale of a block of weights, and its quants.

use half::f16;

use super::packed::{BLOCK, Format};

/// How the scale of a block in `q4` is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// The best of many.
    Search,
    /// By the largest weight, a tenth of the work: for what only ranks.
    Rank,
}

/// Scale and quants of a block.
pub(crate) fn quantize(format: Format, effort: Effort, x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    #[cfg(feature = "cpu")]
    return super::cpu::fit::quantize(format, effort, x);
    #[cfg(not(feature = "cpu"))]
    quantize_kernel(format, effort, x)
}

/// In `q8` -127..=127 by the largest weight; in `q4` -8..=7, where the largest weight gets about -8,
/// and the best of the scales around that.
#[inline(always)]
pub(super) fn quantize_kernel(
    format: Format,
    effort: Effort,
    x: &[f32; BLOCK],
) -> (f16, [i8; BLOCK]) {
    let (mut most, mut least) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            most[lane] = if x[lane] > most[lane] {
                x[lane]
            } else {
                most[lane]
            };
            least[lane] = if x[lane] < least[lane] {
                x[lane]
            } else {
                least[lane]
            };
        }
    }
    let most = most.into_iter().fold(0.0, f32::max);
    let least = least.into_iter().fold(0.0, f32::min);
    let largest = if most >= -least { most } else { least };
    match format {
        Format::Q8 => fit(x, &[largest.abs() / 127.0], -127.0, 127.0),
        Format::Q4 if effort == Effort::Rank => fit(x, &[largest / -8.0], -8.0, 7.0),
        Format::Q4 => {
            let scales: [f32; 21] =
                std::array::from_fn(|step| largest / (-9.0 + 0.1 * step as f32));
            fit(x, &scales, -8.0, 7.0)
        }
        Format::Q4Zero | Format::Q8Zero | Format::Q8Halves => {
            unreachable!("nothing is quantized into it")
        }
    }
}

/// The best of the scales, each after one least-squares step for its own quants.
///
/// The error is weighted with x²: large weights matter most for the products (as llama.cpp's
/// quantizers weigh when they have no importance matrix). With the least-squares scale `Σwxq / Σwq²`
/// the error is `Σwx² - (Σwxq)² / Σwq²`, so the best is where the last term is largest.
#[inline(always)]
fn fit(x: &[f32; BLOCK], scales: &[f32], min: f32, max: f32) -> (f16, [i8; BLOCK]) {
    // Loops over places, not maps: those stay functions without the vectors.
    let (mut w, mut wx) = ([0.0; BLOCK], [0.0; BLOCK]);
    for i in 0..BLOCK {
        w[i] = x[i] * x[i];
        wx[i] = w[i] * x[i];
    }
    let (mut best, mut best_scale, mut best_inverse) = (0.0, 0.0, 0.0);
    for scale in scales {
        let inverse = 1.0 / scale;
        let (mut q, mut wq) = ([0.0; BLOCK], [0.0; BLOCK]);
        for i in 0..BLOCK {
            q[i] = round(x[i] * inverse, min, max);
            wq[i] = w[i] * q[i];
        }
        let (xq, qq) = (dot(&wx, &q), dot(&wq, &q));
        let gain = xq * xq / qq;
        if gain > best {
            (best, best_scale, best_inverse) = (gain, xq / qq, inverse);
        }
    }
    let scale = f16::from_f32(best_scale);
    if best == 0.0 || !scale.is_finite() {
        return (f16::ZERO, [0; BLOCK]);
    }
    let mut q = [0; BLOCK];
    for i in 0..BLOCK {
        q[i] = round(x[i] * best_inverse, min, max) as i8;
    }
    (scale, q)
}

/// Sums that are kept apart, in an order that is the same on every machine.
const LANES: usize = 8;

#[inline(always)]
fn dot(a: &[f32; BLOCK], b: &[f32; BLOCK]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(b.as_chunks::<LANES>().0)
    {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// To the nearest integer, ties to even, inside the bounds.
#[inline(always)]
fn round(x: f32, min: f32, max: f32) -> f32 {
    // 1.5 · 2^23: the sum has no bits behind the point. (`round_ties_even` is a call on old
    // processors.)
    const MAGIC: f32 = 12_582_912.0;
    let bounded = if x > min { x } else { min };
    let bounded = if bounded < max { bounded } else { max };
    bounded + MAGIC - MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_beats_the_plain_scale() {
        let x: [f32; BLOCK] = std::array::from_fn(|i| (i as f32 * 1.7).sin().powi(3));
        let largest = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let error = |scale: f32, q: &dyn Fn(f32) -> f32| -> f32 {
            x.iter().map(|x| x * x * (x - scale * q(*x)).powi(2)).sum()
        };
        let plain = largest / 7.0;
        let plain_error = error(plain, &|x| (x / plain).round().clamp(-8.0, 7.0));
        let (scale, quants) = quantize(Format::Q4, Effort::Search, &x);
        let scale = scale.to_f32();
        let found: f32 = (x.iter().zip(quants))
            .map(|(x, q)| x * x * (x - scale * f32::from(q)).powi(2))
            .sum();
        assert!(found < plain_error, "{found} {plain_error}");
        assert_eq!(
            quantize(Format::Q4, Effort::Search, &x),
            quantize_kernel(Format::Q4, Effort::Search, &x),
            "on any machine"
        );
    }
}
