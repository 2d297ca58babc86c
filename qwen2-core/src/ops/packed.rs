//! Quantized weights of our own: blocks of 32 weights with a scale, rows interleaved by 16.
//!
//! A panel holds 16 rows, two blocks after two blocks: their scales (f16, `[2][16]`, one cache
//! line), the quants of the first, the quants of the second. So a product reads one stream. A group
//! of 64 bytes holds four consecutive columns of each of the 16 rows, row by row: what one 512-bit
//! integer dot product takes, and two 256-bit or four 128-bit ones. In four bits a byte holds two
//! columns, 16 apart. Where blocks have zero points of their own, these come behind the scales and look
//! like them. Panels follow each other; rows are padded with zeros to 16, columns to 64.

use half::f16;

use super::fit::{Effort, quantize};

/// Columns that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Bytes of one step of a panel: four columns of sixteen rows.
pub(crate) const GROUP: usize = 64;

/// How a weight is stored in a block; its value is `scale · (q - offset)`, or `scale · (q - zero)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Eight bits, `q` in 1..=255, offset 128: 8.5 bits a weight.
    Q8,
    /// Four bits, `q` in 0..=15, offset 8: 4.5 bits a weight.
    Q4,
    /// Four bits, `q` in 0..=15, with an f16 zero point for each block: 5 bits a weight. What GPTQ, AWQ
    /// and the blocks of GGUF files that have a minimum become; nothing is quantized into it.
    Q4Zero,
    /// [`Self::Q4Zero`] with a byte for each `q`, 9 bits a weight: what it is brought to for many tokens, and
    /// what blocks of five bits with a minimum become.
    Q8Zero,
    /// [`Self::Q8`] with a scale for each half of a block, 9 bits a weight: what blocks with a scale for 16
    /// weights become.
    Q8Halves,
}

/// What lies beside the scales of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beside {
    Nothing,
    /// Zero points: the scales are those of whole blocks.
    Zeros,
    /// The scales of second halves: the others are those of first halves.
    SecondScales,
}

/// A block of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Block {
    pub(crate) scale: f16,
    /// What lies [beside](Format::beside) the scale.
    pub(crate) other: f16,
    /// Less the offset of the format.
    pub(crate) quants: [i8; BLOCK],
}

impl Block {
    const EMPTY: Self = Self {
        scale: f16::ZERO,
        other: f16::ZERO,
        quants: [0; BLOCK],
    };

    /// Of a format with nothing beside.
    pub(crate) fn centred((scale, quants): (f16, [i8; BLOCK])) -> Self {
        Self {
            scale,
            other: f16::ZERO,
            quants,
        }
    }

    /// Numbers whose halves are multiples of a scale each, off by what f16 rounds away.
    pub(crate) fn halves(scales: [f32; 2], numbers: &[f32; BLOCK]) -> Self {
        let quant = |i: usize| match scales[i / (BLOCK / 2)] {
            0.0 => 0,
            scale => (numbers[i] / scale).round() as i8,
        };
        let [scale, other] = scales.map(f16::from_f32);
        Self {
            scale,
            other,
            quants: std::array::from_fn(quant),
        }
    }

    /// Four or five bits whose values are `scale · q + minimum`, off by what f16 rounds away.
    pub(crate) fn above(scale: f32, minimum: f32, quants: [i8; BLOCK]) -> Self {
        /// f16 has the integers up to it.
        const FARTHEST: f32 = 2048.0;
        let rounded = f16::from_f32(scale);
        let zero = -minimum / rounded.to_f32();
        if zero.abs() <= FARTHEST {
            return Self {
                scale: rounded,
                other: f16::from_f32(zero),
                quants,
            };
        }
        if minimum == 0.0 {
            return Self::EMPTY; // and so is the scale
        }
        // The values hardly differ: coarser steps are finer than f16 has the minimum.
        let coarse = f16::from_f32(minimum.abs() / FARTHEST);
        let step = scale / coarse.to_f32();
        Self {
            scale: coarse,
            other: f16::from_f32(-minimum / coarse.to_f32()),
            quants: quants.map(|q| (f32::from(q) * step).round() as i8),
        }
    }
}

impl Format {
    /// Bytes of the quants of one block of one panel.
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            Self::Q8 | Self::Q8Zero | Self::Q8Halves => ROWS * BLOCK,
            Self::Q4 | Self::Q4Zero => ROWS * BLOCK / 2,
        }
    }

    pub(crate) const fn beside(self) -> Beside {
        match self {
            Self::Q8 | Self::Q4 => Beside::Nothing,
            Self::Q4Zero | Self::Q8Zero => Beside::Zeros,
            Self::Q8Halves => Beside::SecondScales,
        }
    }

    /// Whether there is nothing beside the scales, which is all that GPUs have kernels for.
    pub(crate) const fn is_plain(self) -> bool {
        matches!(self.beside(), Beside::Nothing)
    }

    /// The same with a byte for each quant.
    pub(crate) const fn wide(self) -> Self {
        match self {
            Self::Q8 | Self::Q4 => Self::Q8,
            Self::Q4Zero | Self::Q8Zero => Self::Q8Zero,
            Self::Q8Halves => Self::Q8Halves,
        }
    }

    /// Bytes in front of the quants of two blocks.
    pub(crate) const fn head_bytes(self) -> usize {
        match self.is_plain() {
            true => GROUP,
            false => 2 * GROUP,
        }
    }

    /// Bytes of two blocks of one panel with their scales.
    pub(crate) const fn pair_bytes(self) -> usize {
        self.head_bytes() + 2 * self.block_bytes()
    }

    /// Where the scale of a row and block lies in its panel.
    pub(crate) const fn scale_at(self, block: usize, row: usize) -> usize {
        block / 2 * self.pair_bytes() + (block % 2 * ROWS + row) * 2
    }

    /// Where what is beside the scale of a row and block lies in its panel.
    pub(crate) const fn other_at(self, block: usize, row: usize) -> usize {
        self.scale_at(block, row) + GROUP
    }

    /// Where the quants of a block lie in its panel.
    pub(crate) const fn quants_at(self, block: usize) -> usize {
        block / 2 * self.pair_bytes() + self.head_bytes() + block % 2 * self.block_bytes()
    }

    /// What is taken off a quant.
    pub(crate) const fn offset(self) -> i32 {
        match self {
            Self::Q8 | Self::Q8Halves => 128,
            Self::Q4 => 8,
            Self::Q4Zero | Self::Q8Zero => 0,
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

    /// Blocks of a row, an even number.
    pub(crate) fn blocks(self) -> usize {
        self.cols.div_ceil(BLOCK).next_multiple_of(2)
    }

    pub(crate) fn panel_bytes(self) -> usize {
        self.blocks() / 2 * self.format.pair_bytes()
    }

    /// Bytes in all.
    pub(crate) fn bytes(self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Packs the rows of one panel; `row(i, out)` writes row `i` of the matrix as f32.
    pub(crate) fn pack_panel(
        self,
        panel: usize,
        effort: Effort,
        row: &dyn Fn(usize, &mut [f32]),
        out: &mut [u8],
    ) {
        assert_eq!(out.len(), self.panel_bytes(), "panel length");
        out.fill(0);
        let mut values = vec![0.0; self.blocks() * BLOCK];
        for r in 0..ROWS {
            let index = panel * ROWS + r;
            values.fill(0.0);
            if index < self.rows {
                row(index, &mut values[..self.cols]);
            }
            for (b, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
                let block = Block::centred(quantize(self.format, effort, block));
                self.place(out, r, b, &block);
            }
        }
    }

    /// Writes one panel of blocks that are there already; `block(i, b)` gives block `b` of row `i`. What [`Self::pack_panel`] would not make, an eight-bit -128, is packed anew.
    ///
    /// # Panics
    /// If the rows are no whole blocks.
    pub(crate) fn place_panel(
        self,
        panel: usize,
        block: &dyn Fn(usize, usize) -> Block,
        out: &mut [u8],
    ) {
        assert_eq!(out.len(), self.panel_bytes(), "panel length");
        assert!(self.cols.is_multiple_of(BLOCK), "whole blocks");
        for (r, b) in (0..ROWS).flat_map(|r| (0..self.blocks()).map(move |b| (r, b))) {
            let index = panel * ROWS + r;
            let is_there = index < self.rows && b < self.cols / BLOCK;
            let mut placed = match is_there {
                true => block(index, b),
                false => Block::EMPTY,
            };
            // The kernels flip signs in eight bits.
            if self.format.is_plain() && placed.quants.contains(&i8::MIN) {
                let scale = placed.scale.to_f32();
                let numbers = placed.quants.map(|q| scale * f32::from(q));
                placed = Block::centred(quantize(self.format, Effort::Search, &numbers));
            }
            self.place(out, r, b, &placed);
        }
    }

    /// Writes block `b` of row `r` of a panel.
    fn place(self, panel: &mut [u8], r: usize, b: usize, block: &Block) {
        panel[self.format.scale_at(b, r)..][..2].copy_from_slice(&block.scale.to_le_bytes());
        if !self.format.is_plain() {
            panel[self.format.other_at(b, r)..][..2].copy_from_slice(&block.other.to_le_bytes());
        }
        self.store(&mut panel[self.format.quants_at(b)..], r, &block.quants);
    }

    /// Writes the quants of row `r` of a panel into the bytes of a block.
    fn store(self, block: &mut [u8], r: usize, q: &[i8; BLOCK]) {
        let offset = self.format.offset() as u8;
        let mut bytes = [0; BLOCK];
        for (byte, q) in bytes.iter_mut().zip(q) {
            *byte = (*q as u8).wrapping_add(offset);
        }
        let q = bytes;
        let (first, second) = q.split_at(BLOCK / 2);
        match self.format {
            Format::Q8 | Format::Q8Zero | Format::Q8Halves => {
                for (group, q) in block.chunks_exact_mut(GROUP).zip(q.as_chunks::<4>().0) {
                    group[r * 4..][..4].copy_from_slice(q);
                }
            }
            Format::Q4 | Format::Q4Zero => {
                let both: [u8; BLOCK / 2] = std::array::from_fn(|c| first[c] | second[c] << 4);
                for (group, q) in block.chunks_exact_mut(GROUP).zip(both.as_chunks::<4>().0) {
                    group[r * 4..][..4].copy_from_slice(q);
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
        let r = index % ROWS;
        for (c, out) in out.iter_mut().enumerate() {
            let (b, c) = (c / BLOCK, c % BLOCK);
            let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
            let second = self.format.beside() == Beside::SecondScales && c >= BLOCK / 2;
            let scale = half(match second {
                true => self.format.other_at(b, r),
                false => self.format.scale_at(b, r),
            });
            let block = &panel[self.format.quants_at(b)..];
            let q = match self.format {
                Format::Q8 | Format::Q8Zero | Format::Q8Halves => {
                    block[c / 4 * GROUP + r * 4 + c % 4]
                }
                Format::Q4 | Format::Q4Zero => {
                    block[c % 16 / 4 * GROUP + r * 4 + c % 4] >> (c / 16 * 4) & 15
                }
            };
            let zero = match self.format.beside() {
                Beside::Zeros => half(self.format.other_at(b, r)),
                _ => self.format.offset() as f32,
            };
            *out = scale * (f32::from(q) - zero);
        }
    }
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
            shape.pack_panel(panel, Effort::Search, &row, out);
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
    fn blocks_with_a_minimum_are_off_by_what_f16_rounds_away() {
        let quants = std::array::from_fn(|i| (i * 7 % 16) as i8);
        let half = 2.0_f32.powi(-11);
        for (scale, minimum) in [
            (0.013, -0.1),
            (0.013, 0.0),
            (0.013, 0.7),
            (-0.02, 0.1),
            (1e-6, -0.3), // the values hardly differ
            (0.0, 0.25),  // or not at all
            (0.0, 0.0),
            (3e-5, -0.06), // just within reach
            (0.25, 2.0),   // exact in f16
        ] {
            let block = Block::above(scale, minimum, quants);
            assert!(block.quants.iter().all(|q| (0..16).contains(q)));
            for (q, kept) in quants.iter().zip(block.quants) {
                let want = scale * f32::from(*q) + minimum;
                let got = block.scale.to_f32() * (f32::from(kept) - block.other.to_f32());
                let most = minimum.abs().max((scale * 15.0).abs());
                assert!(
                    (got - want).abs() <= half * most,
                    "{scale} {minimum}: {got} {want}"
                );
            }
        }
        let exact = Block::above(0.25, -2.0, quants);
        assert_eq!((exact.scale.to_f32(), exact.other.to_f32()), (0.25, 8.0));
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
