//! Many tokens times weights in their stored precision, in f32: a few rows of weights are turned into
//! columns of f32 in the cache, and all tokens are multiplied with them.

use super::matmul::Linear;
use super::simd::{Octet, Simd, Stored, per_isa};

/// Fewer tokens than this do not pay for turning the weights.
pub(super) const MIN_TOKENS: usize = 16;
/// Tokens that share turned weights: their sums stay in a cache.
pub(super) const PASS: usize = 512;
/// Tokens whose activations stay in the second-level cache.
const CHUNK: usize = 96;
/// Vectors of rows in a panel.
const VECTORS: usize = 2;

/// Rows of a panel of turned weights.
pub(super) const fn panel_rows(lanes: usize) -> usize {
    VECTORS * lanes
}

/// Columns that are turned at once: the first-level cache holds 16 KiB of a panel.
const fn depth(lanes: usize) -> usize {
    4096 / panel_rows(lanes)
}

per_isa!(pub(super) add_products, add_products_kernel<W: Stored>, (
    args: Linear<'_, W>, tokens: (usize, usize), rows: (usize, usize), turned: &mut Vec<f32>, sums: &mut [f32],
));

/// Adds the products of some tokens and rows (first and number each) to `sums`: rows of whole panels,
/// one a token. `turned`: memory for weights.
///
/// A sum runs over the columns in the same order, whatever tokens and rows are beside it.
///
/// # Safety
/// The instruction set of `S` is present; tokens and rows are inside the checked lengths.
///
/// # Panics
/// If `sums` has another length.
#[inline(always)]
unsafe fn add_products_kernel<S: Simd, W: Stored>(
    args: Linear<'_, W>,
    tokens: (usize, usize),
    rows: (usize, usize),
    turned: &mut Vec<f32>,
    sums: &mut [f32],
) {
    let width = panel_rows(S::LANES);
    let panels = rows.1.div_ceil(width);
    let stride = panels * width;
    assert_eq!(sums.len(), tokens.1 * stride, "room for sums");
    let most = depth(S::LANES);
    turned.resize(panels * width * most, 0.0);
    for start in (0..args.inner).step_by(most) {
        let depth = most.min(args.inner - start);
        for (panel, turned) in turned.chunks_mut(width * most).enumerate() {
            let first = panel * width;
            let rows = (rows.0 + first, width.min(rows.1 - first));
            // SAFETY: the caller's promise.
            unsafe { turn::<S, W>(args, rows, (start, depth), &mut turned[..width * depth]) };
        }
        for chunk in (0..tokens.1).step_by(CHUNK) {
            let end = tokens.1.min(chunk + CHUNK);
            for (panel, turned) in turned.chunks(width * most).enumerate() {
                let mut token = chunk;
                while token < end {
                    let tile = Tile {
                        x: args.x[(tokens.0 + token) * args.inner + start..].as_ptr(),
                        x_stride: args.inner,
                        turned: turned.as_ptr(),
                        depth,
                        sums: sums[token * stride + panel * width..].as_mut_ptr(),
                        stride,
                    };
                    // SAFETY: `depth` columns of so many tokens are there, `depth` columns of the
                    // panel, and a panel of sums of each token.
                    token += unsafe { tile.add_up_to::<S>(end - token) };
                }
            }
        }
    }
}

/// Brings some columns (first and number) of some rows into the order `[column][row]`; rows that are
/// missing in a panel are zeros.
///
/// # Safety
/// As [`add_products_kernel`]; `out` has room for a panel of these columns.
#[inline(always)]
unsafe fn turn<S: Simd, W: Stored>(
    args: Linear<'_, W>,
    rows: (usize, usize),
    columns: (usize, usize),
    out: &mut [f32],
) {
    let (width, depth) = (panel_rows(S::LANES), columns.1);
    let at = |row: usize, column: usize| (rows.0 + row) * args.inner + columns.0 + column;
    for row in (0..width).step_by(8) {
        let whole = if row + 8 <= rows.1 { depth / 8 * 8 } else { 0 };
        for column in (0..whole).step_by(8) {
            // SAFETY: eight columns of eight rows are inside the weights and inside `out`.
            unsafe {
                let mut octets = [S::Octet::zero(); 8];
                for (i, octet) in octets.iter_mut().enumerate() {
                    *octet = W::load(args.weight.as_ptr().add(at(row + i, column)));
                }
                S::Octet::transpose(&mut octets);
                for (i, octet) in octets.iter().enumerate() {
                    octet.store(out.as_mut_ptr().add((column + i) * width + row));
                }
            }
        }
        for column in whole..depth {
            for row in row..row + 8 {
                out[column * width + row] = match row < rows.1 {
                    true => args.weight[at(row, column)].to_f32(),
                    false => 0.0,
                };
            }
        }
    }
}

/// Some tokens, a panel, some columns.
#[derive(Clone, Copy)]
struct Tile {
    x: *const f32,
    /// From one token to the next.
    x_stride: usize,
    turned: *const f32,
    depth: usize,
    sums: *mut f32,
    stride: usize,
}

impl Tile {
    /// Does as many of `left` tokens as the registers hold sums of, and tells how many.
    ///
    /// # Safety
    /// The instruction set of `S` is present; what the tile points at is there for `left` tokens.
    #[inline(always)]
    unsafe fn add_up_to<S: Simd>(self, left: usize) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            match left {
                12.. if S::LANES == 16 => self.add::<S, 12>(),
                6.. => self.add::<S, 6>(),
                4.. => self.add::<S, 4>(),
                2.. => self.add::<S, 2>(),
                _ => self.add::<S, 1>(),
            }
        }
    }

    /// Does `N` tokens, and tells how many that is.
    ///
    /// # Safety
    /// As [`Self::add_up_to`], for `N`.
    #[inline(always)]
    unsafe fn add<S: Simd, const N: usize>(self) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[S::zero(); VECTORS]; N];
            let mut x = [self.x; N];
            for (i, x) in x.iter_mut().enumerate() {
                *x = x.add(i * self.x_stride);
            }
            for column in 0..self.depth {
                let mut weights = [S::zero(); VECTORS];
                for (v, weights) in weights.iter_mut().enumerate() {
                    *weights = S::load(self.turned.add((column * VECTORS + v) * S::LANES));
                }
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x = S::splat(*x.add(column));
                    for (sum, weights) in sums.iter_mut().zip(&weights) {
                        *sum = x.mul_add(*weights, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (v, sum) in sums.iter().enumerate() {
                    let place = self.sums.add(i * self.stride + v * S::LANES);
                    S::load(place).add(*sum).store(place);
                }
            }
        }
        N
    }
}
