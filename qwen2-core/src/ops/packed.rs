//! Quantized weights of our own: blocks of 32 weights with a scale, rows interleaved by 16.
//!
//! A panel holds 16 rows: first their scales (f16, `[blocks][16]`, padded to 64 bytes), then their
//! quants block by block. A group of 64 bytes holds four consecutive columns of each of the 16 rows,
//! row by row: what one 512-bit integer dot product takes, and two 256-bit or four 128-bit ones.
//! In `q4` a byte holds two columns, 16 apart. Panels follow each other; rows and columns are padded
//! with zeros to 16 and 32.

use half::f16;

/// Columns that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Bytes of one step of a panel: four columns of sixteen rows.
pub(crate) const GROUP: usize = 64;

/// How a weight is stored in a block; its value is `scale · (q - offset)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Eight bits, `q` in 1..=255, offset 128: 8.5 bits a weight.
    Q8,
    /// Four bits, `q` in 0..=15, offset 8: 4.5 bits a weight.
    Q4,
}

impl Format {
    /// Bytes of the quants of one block of one panel.
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            Self::Q8 => ROWS * BLOCK,
            Self::Q4 => ROWS * BLOCK / 2,
        }
    }

    /// What is taken off a quant.
    pub(crate) const fn offset(self) -> i32 {
        match self {
            Self::Q8 => 128,
            Self::Q4 => 8,
        }
    }
}

/// The shape of a packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) format: Format,
    /// `out_features`.
    pub(crate) rows: usize,
    /// `in_features`.
    pub(crate) cols: usize,
}

impl Shape {
    pub(crate) fn panels(self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    pub(crate) fn blocks(self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Bytes of the scales of a panel.
    pub(crate) fn scale_bytes(self) -> usize {
        (self.blocks() * ROWS * 2).next_multiple_of(GROUP)
    }

    pub(crate) fn panel_bytes(self) -> usize {
        self.scale_bytes() + self.blocks() * self.format.block_bytes()
    }

    /// Bytes in all.
    pub(crate) fn bytes(self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Packs the rows of one panel; `row(i, out)` writes row `i` of the matrix as f32.
    pub(crate) fn pack_panel(self, panel: usize, row: &dyn Fn(usize, &mut [f32]), out: &mut [u8]) {
        assert_eq!(out.len(), self.panel_bytes(), "panel length");
        out.fill(0);
        let (scales, quants) = out.split_at_mut(self.scale_bytes());
        let mut values = vec![0.0; self.blocks() * BLOCK];
        for r in 0..ROWS {
            let index = panel * ROWS + r;
            values.fill(0.0);
            if index < self.rows {
                row(index, &mut values[..self.cols]);
            }
            for (b, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
                let (scale, q) = match self.format {
                    Format::Q8 => quantize::<127>(block),
                    Format::Q4 => quantize_q4(block),
                };
                scales[(b * ROWS + r) * 2..][..2].copy_from_slice(&scale.to_le_bytes());
                self.store(&mut quants[b * self.format.block_bytes()..], r, &q);
            }
        }
    }

    /// Writes the quants of row `r` of a panel into the bytes of a block.
    fn store(self, block: &mut [u8], r: usize, q: &[i8; BLOCK]) {
        for (c, q) in q.iter().enumerate() {
            let q = (i32::from(*q) + self.format.offset()) as u8;
            match self.format {
                Format::Q8 => block[c / 4 * GROUP + r * 4 + c % 4] = q,
                Format::Q4 => {
                    let c16 = c % 16;
                    block[c16 / 4 * GROUP + r * 4 + c16 % 4] |= q << (c / 16 * 4);
                }
            }
        }
    }

    /// Row `index` of the matrix in `bytes`, as f32: the definition that kernels are tested against.
    pub(crate) fn unpack_row(self, bytes: &[u8], index: usize, out: &mut [f32]) {
        assert_eq!(
            (bytes.len(), out.len()),
            (self.bytes(), self.cols),
            "packed length"
        );
        let panel = &bytes[index / ROWS * self.panel_bytes()..][..self.panel_bytes()];
        let (scales, quants) = panel.split_at(self.scale_bytes());
        let r = index % ROWS;
        for (c, out) in out.iter_mut().enumerate() {
            let (b, c) = (c / BLOCK, c % BLOCK);
            let at = (b * ROWS + r) * 2;
            let scale = f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32();
            let block = &quants[b * self.format.block_bytes()..];
            let q = match self.format {
                Format::Q8 => block[c / 4 * GROUP + r * 4 + c % 4],
                Format::Q4 => block[c % 16 / 4 * GROUP + r * 4 + c % 4] >> (c / 16 * 4) & 15,
            };
            *out = scale * (i32::from(q) - self.format.offset()) as f32;
        }
    }
}

/// Scale and quants in `-MAX..=MAX`, the scale refined by least squares.
fn quantize<const MAX: i32>(x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    let largest = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    fit(x, [largest / MAX as f32].into_iter(), -MAX, MAX)
}

/// Scale and quants in `-8..=7`: the largest weight gets -8, and scales around that are tried.
fn quantize_q4(x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    let largest = x.iter().fold(
        0.0_f32,
        |max, &x| if x.abs() > f32::abs(max) { x } else { max },
    );
    let candidates = (-10..=10).map(|step| largest / (-8.0 + 0.1 * step as f32));
    fit(x, candidates, -8, 7)
}

/// The best of the candidate scales, each after one least-squares step for its own quants.
///
/// The error is weighted with x²: large weights matter most for the products (as llama.cpp's
/// quantizers weigh when they have no importance matrix).
fn fit(
    x: &[f32; BLOCK],
    candidates: impl Iterator<Item = f32>,
    min: i32,
    max: i32,
) -> (f16, [i8; BLOCK]) {
    let mut best = (f16::ZERO, [0; BLOCK]);
    let mut best_error = f32::INFINITY;
    for scale in candidates {
        if scale == 0.0 || !scale.is_finite() {
            continue;
        }
        let q = round(x, scale, min, max);
        let (mut xq, mut qq) = (0.0, 0.0);
        for (x, q) in x.iter().zip(q) {
            let q = f32::from(q);
            xq += x * x * x * q;
            qq += x * x * q * q;
        }
        let refined = if qq > 0.0 { xq / qq } else { scale };
        for scale in [f16::from_f32(scale), f16::from_f32(refined)] {
            let error: f32 = x
                .iter()
                .zip(q)
                .map(|(x, q)| x * x * (x - scale.to_f32() * f32::from(q)).powi(2))
                .sum();
            if error < best_error && scale.is_finite() {
                best_error = error;
                best = (scale, q);
            }
        }
    }
    best
}

fn round(x: &[f32; BLOCK], scale: f32, min: i32, max: i32) -> [i8; BLOCK] {
    let inverse = 1.0 / scale;
    x.map(|x| ((x * inverse).round_ties_even() as i32).clamp(min, max) as i8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols)
            .map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.05)
            .collect()
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

    #[test]
    fn packing_keeps_every_weight_within_half_a_step() {
        for (format, steps) in [(Format::Q8, 127.0), (Format::Q4, 7.0)] {
            for (rows, cols) in [(16, 32), (17, 33), (5, 100), (48, 896)] {
                let shape = Shape { format, rows, cols };
                let w = matrix(rows, cols);
                let bytes = pack(shape, &w);
                let mut row = vec![0.0; cols];
                for (i, want) in w.chunks(cols).enumerate() {
                    shape.unpack_row(&bytes, i, &mut row);
                    for (got, want) in row.iter().zip(want) {
                        assert!(
                            (got - want).abs() <= 0.05 / steps * 1.1,
                            "{format:?} {got} {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_and_tiny_and_infinite_blocks_are_defined() {
        for format in [Format::Q8, Format::Q4] {
            let shape = Shape {
                format,
                rows: 3,
                cols: 32,
            };
            let mut w = vec![0.0; 96];
            w[32..64].fill(1e-30);
            w[64] = f32::INFINITY;
            let bytes = pack(shape, &w);
            let mut row = vec![1.0; 32];
            for i in 0..3 {
                shape.unpack_row(&bytes, i, &mut row);
                assert!(
                    row.iter().all(|x| x.is_finite() && x.abs() < 1e-6),
                    "{format:?} {i}"
                );
            }
        }
    }
}
