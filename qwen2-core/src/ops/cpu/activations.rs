//! Activations in eight bits, for products with packed weights.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::pool;
use super::simd::{Isa, Simd, per_isa};
use crate::ops::packed::BLOCK;

/// Columns that share a scale.
pub(super) const SPAN: usize = 128;
/// Most tokens of a task.
pub(super) const CHUNK: usize = 256;
/// Blocks of weights in a span.
pub(super) const SPAN_BLOCKS: usize = SPAN / BLOCK;

/// Activations as signed bytes, span by span, so that a product takes a span of all tokens from one
/// stretch of memory; padded with zeros to whole spans.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(crate) struct Activations {
    /// `[spans][n][SPAN]`, in -127..=127.
    pub(super) quants: Vec<i8>,
    /// `[spans][n]`.
    pub(super) scales: Vec<f32>,
    /// `[spans][n][SPAN_BLOCKS]`: -128 times the sum of a block's quants, which takes the offset of
    /// eight-bit weights off.
    pub(super) starts: Vec<i32>,
    /// As `starts`, of the first halves of blocks.
    pub(super) firsts: Vec<i32>,
    /// Tokens.
    pub(super) n: usize,
    cols: usize,
}

impl Activations {
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// Quantizes `x` `[n, cols]`; a span with an infinity or a NaN gets a NaN scale, so that it
    /// reaches the output.
    pub(crate) fn new(isa: Isa, x: &[f32], cols: usize) -> Self {
        Self::make(x.len() / cols, cols, &|span, tokens, out| {
            let x = &x[tokens.start * cols + span * SPAN..];
            quantize(isa, x, cols, cols - span * SPAN, out);
        })
    }

    /// What `fill(span, tokens, out)` makes of every span, no more than [`CHUNK`] tokens at once.
    pub(super) fn make(
        n: usize,
        cols: usize,
        fill: &(dyn Fn(usize, Range<usize>, SpanMut<'_>) + Sync),
    ) -> Self {
        let spans = cols.div_ceil(SPAN);
        let mut out = Self {
            quants: vec![0; spans * n * SPAN],
            scales: vec![0.0; spans * n],
            starts: vec![0; spans * n * SPAN_BLOCKS],
            firsts: vec![0; spans * n * SPAN_BLOCKS],
            n,
            cols,
        };
        let chunks = out.chunks_mut();
        if n < 4 {
            for (span, tokens, chunk) in chunks {
                fill(span, tokens, chunk);
            }
            return out;
        }
        let chunks: Vec<_> = chunks.map(|chunk| Mutex::new(Some(chunk))).collect();
        pool::parallel(chunks.len(), &|task| {
            // Each is taken once, by its own task.
            let mut chunk = chunks[task].lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((span, tokens, chunk)) = chunk.take() {
                fill(span, tokens, chunk);
            }
        });
        drop(chunks);
        out
    }

    /// Span, tokens, and their place.
    fn chunks_mut(&mut self) -> impl Iterator<Item = (usize, Range<usize>, SpanMut<'_>)> {
        let n = self.n;
        let spans = self.quants.as_chunks_mut().0.chunks_mut(n);
        let spans = spans.zip(self.scales.chunks_mut(n));
        let spans = spans.zip(self.starts.as_chunks_mut().0.chunks_mut(n));
        let spans = spans.zip(self.firsts.as_chunks_mut().0.chunks_mut(n));
        spans
            .enumerate()
            .flat_map(move |(span, (((quants, scales), starts), firsts))| {
                let chunks = quants.chunks_mut(CHUNK).zip(scales.chunks_mut(CHUNK));
                let chunks = chunks.zip(starts.chunks_mut(CHUNK));
                let chunks = chunks.zip(firsts.chunks_mut(CHUNK)).enumerate();
                chunks.map(move |(chunk, (((quants, scales), starts), firsts))| {
                    let first = chunk * CHUNK;
                    let out = SpanMut {
                        quants,
                        scales,
                        starts,
                        firsts,
                    };
                    (span, first..n.min(first + CHUNK), out)
                })
            })
    }
}

/// A span of some tokens.
pub(super) struct SpanMut<'a> {
    quants: &'a mut [[i8; SPAN]],
    scales: &'a mut [f32],
    starts: &'a mut [[i32; SPAN_BLOCKS]],
    firsts: &'a mut [[i32; SPAN_BLOCKS]],
}

per_isa!(pub(super) quantize, quantize_kernel, (x: &[f32], stride: usize, left: usize, out: SpanMut<'_>));

/// The first `left` columns, but no more than a span, of rows `stride` apart.
///
/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn quantize_kernel<S: Simd>(x: &[f32], stride: usize, left: usize, out: SpanMut<'_>) {
    let width = left.min(SPAN);
    for (i, quants) in out.quants.iter_mut().enumerate() {
        let x = &x[i * stride..][..width];
        (out.scales[i], [out.starts[i], out.firsts[i]]) = match x.as_array::<SPAN>() {
            // SAFETY: the caller's promise.
            Some(x) => unsafe { quantize_span::<S>(x, quants) },
            None => {
                let mut padded = [0.0; SPAN];
                padded[..width].copy_from_slice(x);
                // SAFETY: the caller's promise.
                unsafe { quantize_span::<S>(&padded, quants) }
            }
        };
    }
}

/// Scale and -128 times the sums of the quants, of blocks and of their first halves.
///
/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn quantize_span<S: Simd>(
    x: &[f32; SPAN],
    out: &mut [i8; SPAN],
) -> (f32, [[i32; SPAN_BLOCKS]; 2]) {
    let mut largest = 0_u32;
    for x in x {
        // The bits of |x| are ordered like |x|, with infinity and NaN on top.
        largest = largest.max(x.to_bits() & 0x7FFF_FFFF);
    }
    let largest = f32::from_bits(largest);
    let inverse = 127.0 / largest;
    if !(largest.is_finite() && inverse.is_finite()) {
        *out = [0; SPAN];
        // Zero or subnormal is nothing that a product would show.
        let scale = if largest.is_finite() { 0.0 } else { f32::NAN };
        return (scale, [[0; SPAN_BLOCKS]; 2]);
    }
    // Adding 1.5 · 2^23 rounds to an integer, ties to even.
    const MAGIC: f32 = 12_582_912.0;
    const HALF: usize = BLOCK / 2;
    let (mut starts, mut firsts) = ([0; SPAN_BLOCKS], [0; SPAN_BLOCKS]);
    // SAFETY: a vector from `at` on is inside both.
    unsafe {
        let (inverse, up, down) = (S::splat(inverse), S::splat(MAGIC), S::splat(-MAGIC));
        for block in 0..SPAN_BLOCKS {
            let mut half = |half: usize| {
                let mut sum = S::zero();
                let first = block * BLOCK + half * HALF;
                for at in (first..first + HALF).step_by(S::LANES) {
                    let x = S::load(x.as_ptr().add(at)).mul(inverse);
                    let q = x.add(up).add(down);
                    q.store_i8(out.as_mut_ptr().add(at));
                    sum = sum.add(q);
                }
                sum
            };
            let (first, second) = (half(0), half(1));
            // Exact: below 2^24.
            firsts[block] = -128 * first.sum() as i32;
            starts[block] = -128 * first.add(second).sum() as i32;
        }
    }
    (largest / 127.0, [starts, firsts])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_within_half_a_step_and_their_sums_are_told() {
        for (n, cols) in [(1, 7), (3, 128), (5, 300)] {
            let x: Vec<f32> = (0..n * cols)
                .map(|i| (i as f32 * 0.73).sin() * 3.0)
                .collect();
            for isa in Isa::available() {
                let a = Activations::new(isa, &x, cols);
                assert_eq!((a.n, a.cols()), (n, cols));
                for (i, (token, column)) in (0..n * cols).map(|i| (i, (i / cols, i % cols))) {
                    let at = column / SPAN * n + token;
                    let got = a.scales[at] * f32::from(a.quants[at * SPAN + column % SPAN]);
                    assert!((got - x[i]).abs() <= a.scales[at] * 0.5001, "{isa:?}");
                }
                let sums = a.quants.chunks(BLOCK);
                let sums =
                    sums.map(|block| block.iter().map(|q| -128 * i32::from(*q)).sum::<i32>());
                assert_eq!(a.starts, sums.collect::<Vec<_>>(), "{isa:?}");
                let sums = a.quants.chunks(BLOCK);
                let sums = sums.map(|block| {
                    let first = &block[..BLOCK / 2];
                    first.iter().map(|q| -128 * i32::from(*q)).sum::<i32>()
                });
                assert_eq!(a.firsts, sums.collect::<Vec<_>>(), "{isa:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_makes_the_scale_nan_and_zeros_make_it_zero() {
        let mut x = [1.0; 3 * SPAN];
        x[5] = f32::INFINITY;
        x[2 * SPAN..].fill(1e-42);
        for isa in Isa::available() {
            let a = Activations::new(isa, &x, 3 * SPAN);
            assert!(a.scales[0].is_nan());
            assert_eq!(a.scales[1..], [1.0 / 127.0, 0.0]);
            assert!(
                a.quants[..SPAN]
                    .iter()
                    .chain(&a.quants[2 * SPAN..])
                    .all(|q| *q == 0)
            );
        }
    }
}
