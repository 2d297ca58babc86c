//! The types of GGUF tensors: how many numbers share a block, and what numbers a block stands for.
//!
//! The formulas are those of ggml's `dequantize_row_*` (`ggml-quants.c`), in f32.

use half::{bf16, f16};

/// The type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
}

/// Numbers of a block of the plain types, and of those with `K`.
const SMALL: usize = 32;
const LARGE: usize = 256;

impl Kind {
    const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
    ];

    /// By ggml's number of it.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }

    /// ggml's number of it.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq4Nl => 20,
            Self::Bf16 => 30,
        }
    }

    /// Numbers and bytes of a block.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 | Self::Iq4Nl => (SMALL, 18),
            Self::Q4_1 => (SMALL, 20),
            Self::Q5_0 => (SMALL, 22),
            Self::Q5_1 => (SMALL, 24),
            Self::Q8_0 => (SMALL, 34),
            Self::Q2K => (LARGE, 84),
            Self::Q3K => (LARGE, 110),
            Self::Q4K => (LARGE, 144),
            Self::Q5K => (LARGE, 176),
            Self::Q6K => (LARGE, 210),
        }
    }

    /// Bytes of a row of `cols` numbers.
    pub(crate) fn row_bytes(self, cols: usize) -> usize {
        let (numbers, bytes) = self.block();
        cols / numbers * bytes
    }

    /// ggml's name of it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
        }
    }

    /// How many bits the integers have, where 32 numbers in a row are integers times a scale above a
    /// minimum.
    pub(crate) fn bits_above_minima(self) -> Option<u8> {
        match self {
            Self::Q4_1 | Self::Q4K => Some(4),
            Self::Q5_1 | Self::Q5K => Some(5),
            _ => None,
        }
    }

    /// Scale, minimum and integers of the 32 numbers `index` of a row, of a type that
    /// [has minima](Self::bits_above_minima).
    pub(crate) fn block_with_minimum(self, row: &[u8], index: usize) -> (f32, f32, [i8; SMALL]) {
        let block = self.block_of(row, index);
        let nibble = |byte: u8, high: bool| if high { byte >> 4 } else { byte & 15 };
        if matches!(self, Self::Q4K | Self::Q5K) {
            let j = index % (LARGE / SMALL);
            let (scale, m) = scale_min(&block[4..16], j);
            let (high, quants) = match self {
                Self::Q5K => (Some(&block[16..48]), &block[48..]),
                _ => (None, &block[16..]),
            };
            let quants = std::array::from_fn(|l| {
                let fifth = high.map_or(0, |high| high[l] >> j & 1);
                (nibble(quants[j / 2 * SMALL + l], j % 2 == 1) | fifth << 4) as i8
            });
            return (half_at(block, 0) * scale, -half_at(block, 2) * m, quants);
        }
        let high = match self {
            Self::Q5_1 => u32::from_le_bytes([block[4], block[5], block[6], block[7]]),
            _ => 0,
        };
        let quants = &block[block.len() - SMALL / 2..];
        let quants = std::array::from_fn(|l| {
            let fifth = (high >> l & 1) as u8;
            (nibble(quants[l % 16], l >= 16) | fifth << 4) as i8
        });
        (half_at(block, 0), half_at(block, 2), quants)
    }

    /// What 32 numbers in a row are multiples of, by integers in -127..=127 (of Q3_K and Q8_0 as far as
    /// -128); `None` for types that have no such scale in f16.
    pub(crate) fn scale_of(self, row: &[u8], index: usize) -> Option<f16> {
        let (block, at) = (self.block_of(row, index), self.scale_at()?);
        Some(f16::from_le_bytes([block[at], block[at + 1]]))
    }

    /// Whether [`Self::scale_of`] is there.
    pub(crate) fn has_scales(self) -> bool {
        self.scale_at().is_some()
    }

    /// Where it lies in a block.
    fn scale_at(self) -> Option<usize> {
        match self {
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 | Self::Iq4Nl => Some(0),
            Self::Q3K => Some(108),
            _ => None,
        }
    }

    /// The scales of both halves of the 32 numbers `index` of a row of Q6_K.
    pub(crate) fn half_scales(row: &[u8], index: usize) -> [f32; 2] {
        let block = Self::Q6K.block_of(row, index);
        let scales = &block[192 + index % (LARGE / SMALL) * 2..];
        [scales[0], scales[1]].map(|scale| half_at(block, 208) * f32::from(scale as i8))
    }

    /// The 32 numbers `index` of a row, of a type with [scales](Self::has_scales) or Q6_K.
    pub(crate) fn numbers(self, row: &[u8], index: usize) -> [f32; SMALL] {
        let (block, first) = (self.block_of(row, index), index * SMALL % LARGE);
        let mut out = [0.0; SMALL];
        match self {
            Self::Q3K => q3_k(block, first, &mut out),
            Self::Q6K => q6_k(block, first, &mut out),
            _ => self.dequantize(block, &mut out),
        }
        out
    }

    /// The block that the 32 numbers `index` of a row lie in.
    fn block_of(self, row: &[u8], index: usize) -> &[u8] {
        let (numbers, size) = self.block();
        &row[index * SMALL / numbers * size..][..size]
    }

    /// The numbers that whole blocks stand for.
    ///
    /// # Panics
    /// If `bytes` are not the blocks of `out.len()` numbers.
    pub(crate) fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let (numbers, size) = self.block();
        assert_eq!(bytes.len(), self.row_bytes(out.len()), "length of blocks");
        for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(numbers)) {
            match self {
                Self::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                Self::F16 => out[0] = half_at(block, 0),
                Self::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Self::Q4_0 => q4(block, 2, -8.0 * half_at(block, 0), out),
                Self::Q4_1 => q4(block, 4, half_at(block, 2), out),
                Self::Q5_0 => q5(block, 2, -16.0 * half_at(block, 0), out),
                Self::Q5_1 => q5(block, 4, half_at(block, 2), out),
                Self::Q8_0 => q8_0(block, out),
                Self::Q2K => q2_k(block, out),
                Self::Q3K => q3_k(block, 0, out),
                Self::Q4K => q4_k(block, out),
                Self::Q5K => q5_k(block, out),
                Self::Q6K => q6_k(block, 0, out),
                Self::Iq4Nl => iq4_nl(block, out),
            }
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Nibbles from `at` on: the low ones first, 16 of each; `start` is added.
fn q4(block: &[u8], at: usize, start: f32, out: &mut [f32]) {
    let d = half_at(block, 0);
    for (j, byte) in block[at..].iter().enumerate() {
        out[j] = f32::from(byte & 15) * d + start;
        out[j + 16] = f32::from(byte >> 4) * d + start;
    }
}

/// As [`q4`], with the fifth bits of all in the 32 bits at `at`.
fn q5(block: &[u8], at: usize, start: f32, out: &mut [f32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let bit = |j: usize| ((high >> j & 1) << 4) as u8;
    for (j, byte) in block[at + 4..].iter().enumerate() {
        out[j] = f32::from(byte & 15 | bit(j)) * d + start;
        out[j + 16] = f32::from(byte >> 4 | bit(j + 16)) * d + start;
    }
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(*q as i8) * d;
    }
}

fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, min) = (half_at(block, 80), half_at(block, 82));
    for (i, out) in out.iter_mut().enumerate() {
        // Halves of 128 numbers; in each, four times 32 numbers from two more bits.
        let (half, part, l) = (i / 128, i % 128 / 32, i % 32);
        let scale = scales[i / 16];
        let q = quants[half * 32 + l] >> (2 * part) & 3;
        *out = d * f32::from(scale & 15) * f32::from(q) - min * f32::from(scale >> 4);
    }
}

/// Of a block those from `first` on.
fn q3_k(block: &[u8], first: usize, out: &mut [f32]) {
    let (high, quants, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    // Sixteen scales of six bits: four low bits in eight bytes, two high bits in four.
    let scale = |i: usize| {
        let low = packed[i % 8] >> (i / 8 * 4) & 15;
        let top = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        f32::from((low | top << 4) as i8 - 32)
    };
    for (i, out) in (first..).zip(out) {
        let (half, part, l) = (i / 128, i % 128 / 32, i % 32);
        let q = (quants[half * 32 + l] >> (2 * part) & 3) as i8;
        let off = if high[l] >> (4 * half + part) & 1 == 1 {
            0
        } else {
            4
        };
        *out = d * scale(i / 16) * f32::from(q - off);
    }
}

/// Scale and minimum `j` of eight, six bits each.
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    let (packed, quants) = (&block[4..16], &block[16..]);
    for (i, out) in out.iter_mut().enumerate() {
        let (j, l) = (i / 32, i % 32);
        let q = quants[j / 2 * 32 + l] >> (j % 2 * 4) & 15;
        let (scale, m) = scale_min(packed, j);
        *out = d * scale * f32::from(q) - min * m;
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    let (packed, high, quants) = (&block[4..16], &block[16..48], &block[48..]);
    for (i, out) in out.iter_mut().enumerate() {
        let (j, l) = (i / 32, i % 32);
        let q = quants[j / 2 * 32 + l] >> (j % 2 * 4) & 15 | (high[l] >> j & 1) << 4;
        let (scale, m) = scale_min(packed, j);
        *out = d * scale * f32::from(q) - min * m;
    }
}

/// Of a block those from `first` on.
fn q6_k(block: &[u8], first: usize, out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (i, out) in (first..).zip(out) {
        let (half, part, l) = (i / 128, i % 128 / 32, i % 32);
        let nibble = low[half * 64 + part % 2 * 32 + l] >> (part / 2 * 4) & 15;
        let top = high[half * 32 + l] >> (2 * part) & 3;
        let q = (nibble | top << 4) as i8 - 32;
        *out = d * f32::from(scales[i / 16] as i8) * f32::from(q);
    }
}

fn iq4_nl(block: &[u8], out: &mut [f32]) {
    const VALUES: [i8; 16] = [
        -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
    ];
    let d = half_at(block, 0);
    for (j, byte) in block[2..].iter().enumerate() {
        out[j] = d * f32::from(VALUES[usize::from(byte & 15)]);
        out[j + 16] = d * f32::from(VALUES[usize::from(byte >> 4)]);
    }
}
