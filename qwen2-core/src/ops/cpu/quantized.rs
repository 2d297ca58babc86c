//! `x Wᵀ + b` over packed weights: activations become 8-bit blocks, products are summed as integers.

use std::sync::{Mutex, PoisonError};

use half::f16;

use super::pool;
use super::product::{Product, Sums, Target};
use super::simd::{Isa, Simd, per_isa};
use crate::ops::packed::{BLOCK, Format, GROUP, ROWS, Shape};

/// Activations as blocks of 32 signed bytes with a scale.
pub(crate) struct Activations {
    /// `[n][blocks · 32]`, in -127..=127.
    quants: Vec<i8>,
    /// `[n][blocks]`.
    scales: Vec<f32>,
    /// `[n][blocks]`: -8 times the sum of the quants, which takes the offset of the weights off.
    starts: Vec<i32>,
    blocks: usize,
}

impl Activations {
    /// Tokens.
    fn n(&self) -> usize {
        self.scales.len() / self.blocks
    }

    /// Quantizes `x` `[n, cols]`; a block with an infinity or a NaN gets a NaN scale, so that it
    /// reaches the output.
    pub(crate) fn new(isa: Isa, x: &[f32], cols: usize) -> Self {
        let n = x.len() / cols;
        let blocks = cols.div_ceil(BLOCK).next_multiple_of(2); // as a packed matrix has
        let mut out = Self {
            quants: vec![0; n * blocks * BLOCK],
            scales: vec![0.0; n * blocks],
            starts: vec![0; n * blocks],
            blocks,
        };
        let rows = out.quants.chunks_exact_mut(blocks * BLOCK);
        let rows = rows
            .zip(out.scales.chunks_exact_mut(blocks))
            .zip(out.starts.chunks_exact_mut(blocks));
        let rows = rows.zip(x.chunks_exact(cols));
        if n < 4 {
            for (((quants, scales), starts), x) in rows {
                quantize_row(isa, x, quants, scales, starts);
            }
            return out;
        }
        let rows: Vec<_> = rows.map(Mutex::new).collect();
        pool::parallel(n, &|t| {
            // Each lock is taken once, by its own task.
            let mut row = rows[t].lock().unwrap_or_else(PoisonError::into_inner);
            let (((quants, scales), starts), x) = &mut *row;
            quantize_row(isa, x, quants, scales, starts);
        });
        drop(rows);
        out
    }
}

per_isa!(quantize_row, quantize_row_kernel, (
    x: &[f32], quants: &mut [i8], scales: &mut [f32], starts: &mut [i32],
));

/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn quantize_row_kernel<S: Simd>(
    x: &[f32],
    quants: &mut [i8],
    scales: &mut [f32],
    starts: &mut [i32],
) {
    for (b, x) in x.chunks(BLOCK).enumerate() {
        let out = &mut quants[b * BLOCK..][..BLOCK];
        (scales[b], starts[b]) = match x.as_array::<BLOCK>() {
            Some(x) => quantize_block(x, out),
            None => {
                let mut padded = [0.0; BLOCK];
                padded[..x.len()].copy_from_slice(x);
                quantize_block(&padded, out)
            }
        };
    }
}

/// Scale and -8 times the sum of the quants; loops of fixed length, which vectorise.
#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], out: &mut [i8]) -> (f32, i32) {
    let mut largest = 0_u32;
    for x in x {
        // The bits of |x| are ordered like |x|, with infinity and NaN on top.
        largest = largest.max(x.to_bits() & 0x7FFF_FFFF);
    }
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return (f32::NAN, 0);
    }
    let inverse = 127.0 / largest;
    if !inverse.is_finite() {
        return (0.0, 0); // zero or subnormal: nothing that a product would show
    }
    // Adding 1.5 · 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let mut sum = 0;
    for (x, out) in x.iter().zip(out) {
        let q = (x * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
        *out = q as i8;
        sum += q;
    }
    (largest / 127.0, -8 * sum)
}

/// One multiplication of activations by a packed matrix.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub(crate) x: &'a Activations,
    pub(crate) shape: Shape,
    pub(crate) bytes: &'a [u8],
}

/// [`Packed`] in tasks of some panels each.
pub(crate) struct Panels<'a> {
    isa: Isa,
    args: Packed<'a>,
    target: Target<'a>,
    per_task: usize,
}

impl<'a> Panels<'a> {
    /// `total`: the rows of all the products of the job.
    ///
    /// # Panics
    /// If a length does not fit the shape.
    pub(crate) fn new(isa: Isa, args: Packed<'a>, target: Target<'a>, total: usize) -> Self {
        assert_eq!(args.bytes.len(), args.shape.bytes(), "packed length");
        assert_eq!(args.x.blocks, args.shape.blocks(), "activation width");
        assert_eq!(args.x.n(), target.tokens(), "activation length");
        let panels = total.div_ceil(ROWS);
        // With few tokens the weights are the work: long stretches of them. With many, a task's
        // results are to stay in the second-level cache.
        let per_task = match args.x.n() {
            0..16 => panels.div_ceil(pool::stream_tasks(panels * args.shape.panel_bytes())),
            _ => 2,
        };
        Self {
            isa,
            args,
            target,
            per_task,
        }
    }
}

impl Product for Panels<'_> {
    fn tasks(&self) -> usize {
        self.args.shape.panels().div_ceil(self.per_task)
    }

    fn weights(&self, task: usize) -> pool::Streams {
        let shape = self.args.shape;
        let first = task * self.per_task;
        let end = (first + self.per_task).min(shape.panels());
        pool::streams(
            &self.args.bytes[first * shape.panel_bytes()..end * shape.panel_bytes()],
            &[],
        )
    }

    fn run(&self, task: usize) {
        let first = task * self.per_task;
        let end = (first + self.per_task).min(self.args.shape.panels());
        let mut panel = first;
        while panel < end {
            // Two panels share the broadcasts of the activations.
            let wide = if self.args.x.n() == 1 {
                1
            } else {
                2.min(end - panel)
            };
            // SAFETY: the lengths were checked, and the panels' rows are this task's own.
            unsafe { run_panels(self.isa, self.args, panel, wide, &self.target) };
            panel += wide;
        }
    }
}

/// The products of one token with some panels of a matrix, the others' left out.
///
/// # Panics
/// If a length does not fit the shape, there is no such panel, or one is named twice.
pub(crate) fn some_panels(isa: Isa, args: Packed<'_>, panels: &[usize], target: Target<'_>) {
    const PER_TASK: usize = 8;
    let all = Panels::new(isa, args, target, args.shape.rows);
    let mut seen = vec![false; args.shape.panels()];
    for panel in panels {
        assert!(!std::mem::replace(&mut seen[*panel], true), "named once");
    }
    pool::parallel(panels.len().div_ceil(PER_TASK), &|task| {
        for panel in panels[task * PER_TASK..].iter().take(PER_TASK) {
            // SAFETY: the lengths were checked, and each panel is one task's.
            unsafe { run_panels(isa, all.args, *panel, 1, &all.target) };
        }
    });
}

/// The panels with the largest results, at most `most`, in no order. NaN is above all numbers.
pub(crate) fn best_panels(results: &[f32], most: usize) -> Vec<usize> {
    let panels = results.len().div_ceil(ROWS);
    let key = |panel: usize| {
        let results = &results[panel * ROWS..((panel + 1) * ROWS).min(results.len())];
        let ordered = results.iter().map(|x| {
            // Negative numbers are ordered backwards by their bits.
            let bits = x.to_bits() as i32;
            if x.is_nan() {
                i32::MAX
            } else {
                bits ^ (bits >> 31 & i32::MAX)
            }
        });
        ordered.fold(i32::MIN, i32::max)
    };
    let mut best: Vec<_> = (0..panels).map(|panel| (key(panel), panel)).collect();
    if most < best.len() {
        best.select_nth_unstable_by_key(most, |(key, _)| std::cmp::Reverse(*key));
        best.truncate(most);
    }
    best.into_iter().map(|(_, panel)| panel).collect()
}

/// Tokens of one register tile.
const TOKENS: usize = 4;
/// Rows of one register tile: two panels.
const WIDE: usize = 2 * ROWS;
type TileSums = [[f32; WIDE]; TOKENS];

/// # Safety
/// The lengths are those that [`Panels::new`] checked; no other task has these panels.
unsafe fn run_panels(isa: Isa, args: Packed<'_>, panel: usize, wide: usize, target: &Target<'_>) {
    let Packed { x, shape, bytes } = args;
    let bytes = &bytes[panel * shape.panel_bytes()..][..wide * shape.panel_bytes()];
    let first = panel * ROWS;
    let rows = (first, (wide * ROWS).min(shape.rows - first));
    let n = x.n();
    let mut t = 0;
    while t < n {
        // Tiles of 4, 2 and 1 tokens.
        let tokens = 1 << (n - t).min(TOKENS).ilog2();
        let mut sums: TileSums = [[0.0; WIDE]; TOKENS];
        let tile = Tile { x, t, bytes, shape };
        // SAFETY: `isa` was detected on this machine; the rest is the caller's promise.
        unsafe {
            multiply(isa, tile, tokens, wide, &mut sums);
            let values = sums.as_flattened();
            target.take(
                isa,
                Sums {
                    values,
                    stride: WIDE,
                    tokens: (t, tokens),
                    rows,
                },
            );
        }
        t += tokens;
    }
}

/// Some tokens from `t` on and some panels.
#[derive(Clone, Copy)]
struct Tile<'a> {
    x: &'a Activations,
    t: usize,
    bytes: &'a [u8],
    shape: Shape,
}

/// # Safety
/// `isa` is present on this machine; `tokens` is 1, 2 or 4, `wide` 1 or 2.
unsafe fn multiply(isa: Isa, tile: Tile<'_>, tokens: usize, wide: usize, sums: &mut TileSums) {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! call {
            ($kernel:ident, $wide:literal) => {{
                // SAFETY: the caller's promise.
                unsafe {
                    match (tokens, tile.shape.format) {
                        (1, Format::Q8) => x86::$kernel::<1, $wide, true>(tile, sums),
                        (1, Format::Q4) => x86::$kernel::<1, $wide, false>(tile, sums),
                        (2, Format::Q8) => x86::$kernel::<2, $wide, true>(tile, sums),
                        (2, Format::Q4) => x86::$kernel::<2, $wide, false>(tile, sums),
                        (_, Format::Q8) => x86::$kernel::<TOKENS, $wide, true>(tile, sums),
                        (_, Format::Q4) => x86::$kernel::<TOKENS, $wide, false>(tile, sums),
                    }
                }
                return;
            }};
        }
        match (isa, wide) {
            (Isa::Avx512Vnni, 1) => call!(avx512_vnni, 1),
            (Isa::Avx512Vnni, _) => call!(avx512_vnni, 2),
            (Isa::Avx512 | Isa::Avx2, 1) => call!(avx2, 1),
            (Isa::Avx512 | Isa::Avx2, _) => call!(avx2, 2),
            (Isa::Portable, _) => {}
        }
    }
    let _ = isa;
    portable(tile, tokens, wide, sums);
}

fn portable(tile: Tile<'_>, tokens: usize, wide: usize, sums: &mut TileSums) {
    let Tile { x, shape, .. } = tile;
    let bytes = shape.format.block_bytes();
    for (i, p) in (0..tokens).flat_map(|i| (0..wide).map(move |p| (i, p))) {
        let sums = &mut sums[i][p * ROWS..][..ROWS];
        let panel = &tile.bytes[p * shape.panel_bytes()..][..shape.panel_bytes()];
        let row = (tile.t + i) * x.blocks;
        for b in 0..x.blocks {
            let xs = &x.quants[(row + b) * BLOCK..][..BLOCK];
            let block = &panel[shape.format.quants_at(b)..][..bytes];
            let start = x.starts[row + b] * shape.format.offset() / 8;
            for (r, sum) in sums.iter_mut().enumerate() {
                let mut total = start;
                for (c, x) in xs.iter().enumerate() {
                    let q = match shape.format {
                        Format::Q8 => block[c / 4 * GROUP + r * 4 + c % 4],
                        Format::Q4 => {
                            block[c % 16 / 4 * GROUP + r * 4 + c % 4] >> (c / 16 * 4) & 15
                        }
                    };
                    total += i32::from(q) * i32::from(*x);
                }
                let at = shape.format.scale_at(b, r);
                let scale = f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
                *sum += total as f32 * (scale * x.scales[row + b]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Format, ROWS, Tile, TileSums};

    /// # Safety
    /// The instruction set is present; `tile` has `N` tokens from `t` on and `P` panels.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn avx512_vnni<const N: usize, const P: usize, const Q8: bool>(
        tile: Tile<'_>,
        sums: &mut TileSums,
    ) {
        let Tile { x, shape, .. } = tile;
        let row = tile.t * x.blocks;
        let low = _mm512_set1_epi8(15);
        let format = if Q8 { Format::Q8 } else { Format::Q4 }; // a constant of this function
        let mut acc = [[_mm512_setzero_ps(); P]; N];
        // SAFETY: every pointer stays inside the lengths that `Panels::new` checked: `blocks`
        // blocks a panel and a token, `N` tokens.
        unsafe {
            let panels: [_; P] =
                std::array::from_fn(|p| tile.bytes.as_ptr().add(p * shape.panel_bytes()));
            let columns: [*const i32; N] =
                std::array::from_fn(|i| x.quants.as_ptr().add((row + i * x.blocks) * BLOCK).cast());
            let starts: [*const i32; N] =
                std::array::from_fn(|i| x.starts.as_ptr().add(row + i * x.blocks));
            let x_scales: [*const f32; N] =
                std::array::from_fn(|i| x.scales.as_ptr().add(row + i * x.blocks));
            // Pair by pair of blocks, so that the offsets inside are constants.
            let mut panels = panels;
            for b in (0..x.blocks).step_by(2) {
                for half in 0..2 {
                    let b = b + half;
                    // The offset of the weights times the sum of the activations.
                    let mut totals = starts.map(|starts| {
                        let start = _mm512_set1_epi32(*starts.add(b));
                        [if Q8 {
                            _mm512_slli_epi32::<4>(start)
                        } else {
                            start
                        }; P]
                    });
                    for g in 0..4 {
                        // Columns 4 g.. and 16 + 4 g.. of the block.
                        let w = panels.map(|panel| {
                            let quants = panel.add(format.quants_at(half) + g * 64);
                            let first = _mm512_loadu_si512(quants.cast());
                            if Q8 {
                                (first, _mm512_loadu_si512(quants.add(256).cast()))
                            } else {
                                let high = _mm512_srli_epi16::<4>(first);
                                (_mm512_and_si512(first, low), _mm512_and_si512(high, low))
                            }
                        });
                        for (totals, columns) in totals.iter_mut().zip(columns) {
                            let columns = columns.add(b * 8 + g);
                            let first = _mm512_set1_epi32(columns.read_unaligned());
                            let second = _mm512_set1_epi32(columns.add(4).read_unaligned());
                            for (total, w) in totals.iter_mut().zip(w) {
                                *total = _mm512_dpbusd_epi32(*total, w.0, first);
                            }
                            for (total, w) in totals.iter_mut().zip(w) {
                                *total = _mm512_dpbusd_epi32(*total, w.1, second);
                            }
                        }
                    }
                    let scales = panels.map(|panel| {
                        let scales = panel.add(format.scale_at(half, 0));
                        _mm512_cvtph_ps(_mm256_loadu_si256(scales.cast()))
                    });
                    for ((acc, totals), x_scales) in acc.iter_mut().zip(totals).zip(x_scales) {
                        let x_scale = _mm512_set1_ps(*x_scales.add(b));
                        for p in 0..P {
                            let total = _mm512_cvtepi32_ps(totals[p]);
                            let scale = _mm512_mul_ps(scales[p], x_scale);
                            acc[p] = _mm512_fmadd_ps(total, scale, acc[p]);
                        }
                    }
                }
                panels = panels.map(|panel| panel.add(format.pair_bytes()));
            }
            for (acc, sums) in acc.iter().zip(sums) {
                for (p, acc) in acc.iter().enumerate() {
                    _mm512_storeu_ps(sums.as_mut_ptr().add(p * ROWS), *acc);
                }
            }
        }
    }

    /// # Safety
    /// As [`avx512_vnni`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2<const N: usize, const P: usize, const Q8: bool>(
        tile: Tile<'_>,
        sums: &mut TileSums,
    ) {
        let Tile { x, shape, .. } = tile;
        let row = tile.t * x.blocks;
        let format = if Q8 { Format::Q8 } else { Format::Q4 };
        let ones = _mm256_set1_epi16(1);
        let flip = _mm256_set1_epi8(-128);
        let low = _mm256_set1_epi8(15);
        for half in 0..2 * P {
            let mut acc = [_mm256_setzero_ps(); N];
            // SAFETY: as in `avx512_vnni`; a half is eight rows, 32 bytes of every group.
            unsafe {
                let panel = tile.bytes.as_ptr().add(half / 2 * shape.panel_bytes());
                for b in 0..x.blocks {
                    let quants = panel.add(format.quants_at(b) + half % 2 * 32);
                    let scales = panel.add(format.scale_at(b, half % 2 * 8));
                    let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales.cast()));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let at = row + i * x.blocks + b;
                        let columns: *const i32 = x.quants.as_ptr().add(at * BLOCK).cast();
                        let mut total = if Q8 {
                            _mm256_setzero_si256()
                        } else {
                            _mm256_set1_epi32(*x.starts.get_unchecked(at))
                        };
                        if Q8 {
                            for g in 0..8 {
                                let w = _mm256_loadu_si256(quants.add(g * 64).cast());
                                let w = _mm256_xor_si256(w, flip); // -127..=127
                                let x = _mm256_set1_epi32(columns.add(g).read_unaligned());
                                // |x| · (w with the sign of x): two products stay below 2^15.
                                let p = _mm256_maddubs_epi16(
                                    _mm256_abs_epi8(x),
                                    _mm256_sign_epi8(w, x),
                                );
                                total = _mm256_add_epi32(total, _mm256_madd_epi16(p, ones));
                            }
                        } else {
                            for g in 0..4 {
                                let both = _mm256_loadu_si256(quants.add(g * 64).cast());
                                let first = _mm256_and_si256(both, low);
                                let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
                                let xa = _mm256_set1_epi32(columns.add(g).read_unaligned());
                                let xb = _mm256_set1_epi32(columns.add(g + 4).read_unaligned());
                                let p = _mm256_add_epi16(
                                    _mm256_maddubs_epi16(first, xa),
                                    _mm256_maddubs_epi16(second, xb),
                                );
                                total = _mm256_add_epi32(total, _mm256_madd_epi16(p, ones));
                            }
                        }
                        let xs = _mm256_set1_ps(*x.scales.get_unchecked(at));
                        let scale = _mm256_mul_ps(scale, xs);
                        *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, *acc);
                    }
                }
                for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
                    _mm256_storeu_ps(sums.as_mut_ptr().add(half * 8), *acc);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::product::{Finish, run_all};
    use super::*;
    use crate::ops::packed::Effort;

    fn wave(len: usize, f: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * f).sin()).collect()
    }

    fn pack(shape: Shape, w: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; shape.bytes()];
        for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
            let row =
                |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * shape.cols..][..shape.cols]);
            shape.pack_panel(panel, Effort::Search, &row, out);
        }
        bytes
    }

    fn product(isa: Isa, x: &Activations, shape: Shape, bytes: &[u8], bias: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.n() * shape.rows];
        let target = Target::new(
            &mut out,
            shape.rows,
            0..shape.rows,
            Finish::Store,
            Some(bias),
        );
        run_all(&[&Panels::new(
            isa,
            Packed { x, shape, bytes },
            target,
            shape.rows,
        )]);
        out
    }

    /// Both sides as the kernels see them, multiplied in f64.
    fn reference(x: &Activations, shape: Shape, bytes: &[u8], bias: &[f32]) -> Vec<f32> {
        let n = x.scales.len() / x.blocks;
        let mut row = vec![0.0; shape.cols];
        let mut out = vec![0.0; n * shape.rows];
        for r in 0..shape.rows {
            shape.unpack_row(bytes, r, &mut row);
            for t in 0..n {
                let sum: f64 = row
                    .iter()
                    .enumerate()
                    .map(|(c, w)| {
                        let scale = f64::from(x.scales[t * x.blocks + c / BLOCK]);
                        f64::from(*w) * scale * f64::from(x.quants[t * x.blocks * BLOCK + c])
                    })
                    .sum();
                out[t * shape.rows + r] = (sum + f64::from(bias[r])) as f32;
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn packed_linear_matches_the_definition_for_odd_shapes(
            n in 1usize..20, rows in 1usize..70, cols in 1usize..150, q8 in any::<bool>(),
        ) {
            let shape = Shape { format: if q8 { Format::Q8 } else { Format::Q4 }, rows, cols };
            let bytes = pack(shape, &wave(rows * cols, 0.37));
            let x = Activations::new(Isa::Portable, &wave(n * cols, 0.73), cols);
            let bias = wave(rows, 0.9);
            let want = reference(&x, shape, &bytes, &bias);
            for isa in Isa::available() {
                let out = product(isa, &x, shape, &bytes, &bias);
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() < 1e-4, "{isa:?} {shape:?}: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn some_panels_are_those_of_the_whole_product() {
        let shape = Shape {
            format: Format::Q8,
            rows: 90,
            cols: 70,
        };
        let bytes = pack(shape, &wave(90 * 70, 0.37));
        let x = Activations::new(Isa::Portable, &wave(70, 0.73), 70);
        for isa in Isa::available() {
            let whole = product(isa, &x, shape, &bytes, &[0.0; 90]);
            let mut out = [f32::NAN; 90];
            let target = Target::new(&mut out, 90, 0..90, Finish::Store, None);
            let args = Packed {
                x: &x,
                shape,
                bytes: &bytes,
            };
            some_panels(isa, args, &[5, 1], target);
            for (row, (out, whole)) in out.iter().zip(&whole).enumerate() {
                match row / ROWS {
                    1 | 5 => assert_eq!(out, whole, "{isa:?}"),
                    _ => assert!(out.is_nan()),
                }
            }
        }
    }

    #[test]
    fn the_best_panels_have_the_largest_results() {
        let mut results = wave(16 * 20 + 3, 0.01);
        results.iter_mut().for_each(|x| *x -= 3.0);
        (results[40], results[16 * 20 + 1], results[100]) = (5.0, 4.0, -0.5);
        let mut best = best_panels(&results, 3);
        best.sort_unstable();
        assert_eq!(best, [2, 6, 20]);
        results[0] = f32::NAN;
        assert_eq!(best_panels(&results, 1), [0]);
        assert_eq!(best_panels(&results, 99).len(), 21);
    }

    #[test]
    fn extreme_activations_do_not_saturate() {
        let shape = Shape {
            format: Format::Q8,
            rows: 16,
            cols: 64,
        };
        let w: Vec<f32> = (0..16 * 64)
            .map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })
            .collect();
        let bytes = pack(shape, &w);
        let x = Activations::new(Isa::Portable, &w[..64], 64);
        for isa in Isa::available() {
            let out = product(isa, &x, shape, &bytes, &[0.0; 16]);
            assert!(
                out.iter().all(|out| (out - 64.0).abs() < 0.1),
                "{isa:?} {out:?}"
            );
        }
    }

    #[test]
    fn a_nan_reaches_the_output() {
        let shape = Shape {
            format: Format::Q4,
            rows: 2,
            cols: 32,
        };
        let bytes = pack(shape, &[0.5; 64]);
        let mut x = vec![1.0; 32];
        x[3] = f32::NAN;
        for isa in Isa::available() {
            let x = Activations::new(Isa::Portable, &x, 32);
            let out = product(isa, &x, shape, &bytes, &[0.0; 2]);
            assert!(out.iter().all(|out| out.is_nan()), "{isa:?}");
        }
    }
}
