//! `x Wᵀ + b` over packed weights: activations become 8-bit blocks, products are summed as integers.

use std::sync::{Mutex, PoisonError};

use half::f16;

use super::pool;
use super::simd::{Isa, Simd, per_isa};
use crate::ops::packed::{BLOCK, Format, GROUP, ROWS, Shape};

/// Activations as blocks of 32 signed bytes with a scale.
pub(crate) struct Activations {
    /// `[n][blocks · 32]`, in -127..=127.
    quants: Vec<i8>,
    /// `[n][blocks]`.
    scales: Vec<f32>,
    /// `[n][blocks]`: the sum of the quants, which the offset of the weights is taken off by.
    sums: Vec<i32>,
    blocks: usize,
}

impl Activations {
    /// Quantizes `x` `[n, cols]`; a block with an infinity or a NaN gets a NaN scale, so that it
    /// reaches the output.
    pub(crate) fn new(isa: Isa, x: &[f32], cols: usize) -> Self {
        let n = x.len() / cols;
        let blocks = cols.div_ceil(BLOCK);
        let mut out = Self {
            quants: vec![0; n * blocks * BLOCK],
            scales: vec![0.0; n * blocks],
            sums: vec![0; n * blocks],
            blocks,
        };
        let rows = out.quants.chunks_exact_mut(blocks * BLOCK);
        let rows = rows
            .zip(out.scales.chunks_exact_mut(blocks))
            .zip(out.sums.chunks_exact_mut(blocks));
        let rows = rows.zip(x.chunks_exact(cols));
        if n < 4 {
            for (((quants, scales), sums), x) in rows {
                quantize_row(isa, x, quants, scales, sums);
            }
            return out;
        }
        let rows: Vec<_> = rows.map(Mutex::new).collect();
        pool::parallel(n, &|t| {
            // Each lock is taken once, by its own task.
            let mut row = rows[t].lock().unwrap_or_else(PoisonError::into_inner);
            let (((quants, scales), sums), x) = &mut *row;
            quantize_row(isa, x, quants, scales, sums);
        });
        drop(rows);
        out
    }
}

per_isa!(quantize_row, quantize_row_kernel, (
    x: &[f32], quants: &mut [i8], scales: &mut [f32], sums: &mut [i32],
));

/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn quantize_row_kernel<S: Simd>(
    x: &[f32],
    quants: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    for (b, x) in x.chunks(BLOCK).enumerate() {
        let out = &mut quants[b * BLOCK..][..BLOCK];
        (scales[b], sums[b]) = match x.as_array::<BLOCK>() {
            Some(x) => quantize_block(x, out),
            None => {
                let mut padded = [0.0; BLOCK];
                padded[..x.len()].copy_from_slice(x);
                quantize_block(&padded, out)
            }
        };
    }
}

/// Scale and sum of the quants; loops of fixed length, which vectorise.
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
    (largest / 127.0, sum)
}

#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: every task writes its own range of columns only.
unsafe impl Sync for Out {}

/// One multiplication by a packed matrix.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub(crate) shape: Shape,
    pub(crate) bytes: &'a [u8],
    pub(crate) bias: Option<&'a [f32]>,
}

/// Computes `x` `[n, cols]` into `out` `[n, rows]` on the threads of the current pool.
///
/// # Panics
/// If a length does not fit the shape.
pub(crate) fn linear(isa: Isa, x: &Activations, weight: Packed<'_>, out: &mut [f32]) {
    let shape = weight.shape;
    assert_eq!(weight.bytes.len(), shape.bytes(), "packed length");
    assert_eq!(x.blocks, shape.blocks(), "activation width");
    assert_eq!(
        x.scales.len() / x.blocks * shape.rows,
        out.len(),
        "output length"
    );
    assert!(
        weight.bias.is_none_or(|bias| bias.len() == shape.rows),
        "bias length"
    );
    let panels = shape.panels();
    let per_task = panels.div_ceil(pool::current_threads() * 4).max(1);
    let target = Out(out.as_mut_ptr());
    pool::parallel(panels.div_ceil(per_task), &|task| {
        for panel in task * per_task..((task + 1) * per_task).min(panels) {
            // SAFETY: the lengths were checked above, and the panel's columns are this task's own.
            unsafe { run_panel(isa, x, weight, panel, target) };
        }
    });
}

/// Tokens that a panel is multiplied with before its next block is read.
const TOKENS: usize = 8;

/// # Safety
/// The lengths are those that [`linear`] checked; no other task has this panel.
unsafe fn run_panel(isa: Isa, x: &Activations, weight: Packed<'_>, panel: usize, out: Out) {
    let shape = weight.shape;
    let n = x.scales.len() / x.blocks;
    let bytes = &weight.bytes[panel * shape.panel_bytes()..][..shape.panel_bytes()];
    let (scales, quants) = bytes.split_at(shape.scale_bytes());
    let first = panel * ROWS;
    let width = ROWS.min(shape.rows - first);
    let mut bias = [0.0; ROWS];
    if let Some(values) = weight.bias {
        bias[..width].copy_from_slice(&values[first..first + width]);
    }
    let mut t = 0;
    while t < n {
        let tokens = TOKENS.min(n - t);
        let mut sums = [[0.0_f32; ROWS]; TOKENS];
        let tile = Tile {
            x,
            t,
            scales,
            quants,
            format: shape.format,
        };
        // SAFETY: `isa` was detected on this machine.
        unsafe { multiply(isa, tile, tokens, &mut sums) };
        for (i, sums) in sums.iter().enumerate().take(tokens) {
            for (r, sum) in sums.iter().enumerate().take(width) {
                // SAFETY: the caller's promise.
                unsafe { *out.0.add((t + i) * shape.rows + first + r) = sum + bias[r] };
            }
        }
        t += tokens;
    }
}

/// Some tokens and one panel.
#[derive(Clone, Copy)]
struct Tile<'a> {
    x: &'a Activations,
    t: usize,
    scales: &'a [u8],
    quants: &'a [u8],
    format: Format,
}

/// # Safety
/// `isa` is present on this machine.
unsafe fn multiply(isa: Isa, tile: Tile<'_>, tokens: usize, sums: &mut [[f32; ROWS]; TOKENS]) {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! call {
            ($kernel:ident) => {{
                // SAFETY: the caller's promise.
                unsafe {
                    match (tokens, tile.format) {
                        (1, Format::Q8) => x86::$kernel::<1, true>(tile, sums),
                        (1, Format::Q4) => x86::$kernel::<1, false>(tile, sums),
                        (TOKENS, Format::Q8) => x86::$kernel::<TOKENS, true>(tile, sums),
                        (TOKENS, Format::Q4) => x86::$kernel::<TOKENS, false>(tile, sums),
                        _ => one_by_one(isa, tile, tokens, sums),
                    }
                }
                return;
            }};
        }
        match isa {
            Isa::Avx512Vnni => call!(avx512_vnni),
            Isa::Avx512 | Isa::Avx2 => call!(avx2),
            Isa::Portable => {}
        }
    }
    let _ = isa;
    portable(tile, tokens, sums);
}

/// The tokens that do not fill a tile.
///
/// # Safety
/// As [`multiply`].
#[cfg(target_arch = "x86_64")]
unsafe fn one_by_one(isa: Isa, tile: Tile<'_>, tokens: usize, sums: &mut [[f32; ROWS]; TOKENS]) {
    for (i, sums) in sums.iter_mut().enumerate().take(tokens) {
        let mut one = [[0.0; ROWS]; TOKENS];
        // SAFETY: the caller's promise.
        unsafe {
            multiply(
                isa,
                Tile {
                    t: tile.t + i,
                    ..tile
                },
                1,
                &mut one,
            )
        };
        *sums = one[0];
    }
}

fn portable(tile: Tile<'_>, tokens: usize, sums: &mut [[f32; ROWS]; TOKENS]) {
    let blocks = tile.x.blocks;
    let bytes = tile.format.block_bytes();
    for (i, sums) in sums.iter_mut().enumerate().take(tokens) {
        let row = (tile.t + i) * blocks;
        for b in 0..blocks {
            let x = &tile.x.quants[(row + b) * BLOCK..][..BLOCK];
            let block = &tile.quants[b * bytes..][..bytes];
            let start = -tile.format.offset() * tile.x.sums[row + b];
            for (r, sum) in sums.iter_mut().enumerate() {
                let mut total = start;
                for (c, x) in x.iter().enumerate() {
                    let q = match tile.format {
                        Format::Q8 => block[c / 4 * GROUP + r * 4 + c % 4],
                        Format::Q4 => {
                            block[c % 16 / 4 * GROUP + r * 4 + c % 4] >> (c / 16 * 4) & 15
                        }
                    };
                    total += i32::from(q) * i32::from(*x);
                }
                let at = (b * ROWS + r) * 2;
                let scale = f16::from_le_bytes([tile.scales[at], tile.scales[at + 1]]).to_f32();
                *sum += total as f32 * (scale * tile.x.scales[row + b]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, ROWS, TOKENS, Tile};

    /// # Safety
    /// The instruction set is present; `tile` has `N` tokens from `t` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn avx512_vnni<const N: usize, const Q8: bool>(
        tile: Tile<'_>,
        sums: &mut [[f32; ROWS]; TOKENS],
    ) {
        let blocks = tile.x.blocks;
        let row = tile.t * blocks;
        let low = _mm512_set1_epi8(15);
        let offset = if Q8 { -128 } else { -8 };
        let mut acc = [_mm512_setzero_ps(); N];
        // SAFETY: every pointer stays inside the lengths that `linear` checked: `blocks` blocks a
        // panel and a token, `N` tokens.
        unsafe {
            let mut quants = tile.quants.as_ptr();
            let mut scales = tile.scales.as_ptr();
            for b in 0..blocks {
                let scale = _mm512_cvtph_ps(_mm256_loadu_si256(scales.cast()));
                let mut w = [_mm512_setzero_si512(); 8];
                if Q8 {
                    for (g, w) in w.iter_mut().enumerate() {
                        *w = _mm512_loadu_si512(quants.add(g * 64).cast());
                    }
                    quants = quants.add(512);
                } else {
                    for g in 0..4 {
                        let both = _mm512_loadu_si512(quants.add(g * 64).cast());
                        w[g] = _mm512_and_si512(both, low);
                        w[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low);
                    }
                    quants = quants.add(256);
                }
                scales = scales.add(ROWS * 2);
                for (i, acc) in acc.iter_mut().enumerate() {
                    let at = row + i * blocks + b;
                    let x: *const i32 = tile.x.quants.as_ptr().add(at * BLOCK).cast();
                    let start = offset * *tile.x.sums.get_unchecked(at);
                    let mut even = _mm512_set1_epi32(start);
                    let mut odd = _mm512_setzero_si512();
                    for g in 0..4 {
                        even = _mm512_dpbusd_epi32(
                            even,
                            w[2 * g],
                            _mm512_set1_epi32(x.add(2 * g).read_unaligned()),
                        );
                        odd = _mm512_dpbusd_epi32(
                            odd,
                            w[2 * g + 1],
                            _mm512_set1_epi32(x.add(2 * g + 1).read_unaligned()),
                        );
                    }
                    let total = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
                    let scale =
                        _mm512_mul_ps(scale, _mm512_set1_ps(*tile.x.scales.get_unchecked(at)));
                    *acc = _mm512_fmadd_ps(total, scale, *acc);
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                _mm512_storeu_ps(sums.as_mut_ptr(), *acc);
            }
        }
    }

    /// # Safety
    /// As [`avx512_vnni`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn avx2<const N: usize, const Q8: bool>(
        tile: Tile<'_>,
        sums: &mut [[f32; ROWS]; TOKENS],
    ) {
        let blocks = tile.x.blocks;
        let row = tile.t * blocks;
        let ones = _mm256_set1_epi16(1);
        let flip = _mm256_set1_epi8(-128);
        let low = _mm256_set1_epi8(15);
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); N];
            // SAFETY: as in `avx512_vnni`; a half is eight rows, 32 bytes of every group.
            unsafe {
                let mut quants = tile.quants.as_ptr().add(half * 32);
                let mut scales = tile.scales.as_ptr().add(half * 16);
                for b in 0..blocks {
                    let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales.cast()));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let at = row + i * blocks + b;
                        let x: *const i32 = tile.x.quants.as_ptr().add(at * BLOCK).cast();
                        let mut total = if Q8 {
                            _mm256_setzero_si256()
                        } else {
                            _mm256_set1_epi32(-8 * *tile.x.sums.get_unchecked(at))
                        };
                        if Q8 {
                            for g in 0..8 {
                                let w = _mm256_loadu_si256(quants.add(g * 64).cast());
                                let w = _mm256_xor_si256(w, flip); // -127..=127
                                let x = _mm256_set1_epi32(x.add(g).read_unaligned());
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
                                let xa = _mm256_set1_epi32(x.add(g).read_unaligned());
                                let xb = _mm256_set1_epi32(x.add(g + 4).read_unaligned());
                                let p = _mm256_add_epi16(
                                    _mm256_maddubs_epi16(first, xa),
                                    _mm256_maddubs_epi16(second, xb),
                                );
                                total = _mm256_add_epi32(total, _mm256_madd_epi16(p, ones));
                            }
                        }
                        let scale =
                            _mm256_mul_ps(scale, _mm256_set1_ps(*tile.x.scales.get_unchecked(at)));
                        *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, *acc);
                    }
                    quants = quants.add(if Q8 { 512 } else { 256 });
                    scales = scales.add(ROWS * 2);
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

    use super::*;

    fn wave(len: usize, f: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * f).sin()).collect()
    }

    fn pack(shape: Shape, w: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; shape.bytes()];
        for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
            let row =
                |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * shape.cols..][..shape.cols]);
            shape.pack_panel(panel, &row, out);
        }
        bytes
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
                let mut out = vec![f32::NAN; n * rows];
                linear(isa, &x, Packed { shape, bytes: &bytes, bias: Some(&bias) }, &mut out);
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() < 1e-4, "{isa:?} {shape:?}: {out} {want}");
                }
            }
        }
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
            let mut out = vec![0.0; 16];
            linear(
                isa,
                &x,
                Packed {
                    shape,
                    bytes: &bytes,
                    bias: None,
                },
                &mut out,
            );
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
            let mut out = vec![0.0; 2];
            linear(
                isa,
                &Activations::new(Isa::Portable, &x, 32),
                Packed {
                    shape,
                    bytes: &bytes,
                    bias: None,
                },
                &mut out,
            );
            assert!(out.iter().all(|out| out.is_nan()), "{isa:?}");
        }
    }
}
