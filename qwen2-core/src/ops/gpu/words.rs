//! Weights as words of 32 bits, and what they stand for: no kernel asks a device for 16-bit or 8-bit types.

use burn_cubecl::cubecl::{self, prelude::*};
use half::f16;

/// Four words, the unit of memory traffic.
pub(super) type Words = Vector<u32, Const<4>>;
/// Four numbers.
pub(super) type Four = Vector<f32, Const<4>>;

/// How the numbers of a dense matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Numbers {
    F32,
    F16,
    Bf16,
}

impl Numbers {
    /// In four words.
    pub(super) const fn per_vector(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 8,
        }
    }
}

/// An f16 in the low half of a word. Subnormal ones are computed: a device may flush those of f32.
#[cube]
pub(super) fn from_f16(bits: u32) -> f32 {
    let sign = (bits & 0x8000) << 16;
    let magnitude = bits & 0x7fff;
    let normal = f32::reinterpret((magnitude << 13) + 0x3800_0000);
    let tiny = f32::cast_from(magnitude) * 5.960_464_5e-8;
    let value = select(magnitude < 0x400, tiny, normal);
    f32::reinterpret(u32::reinterpret(value) | sign)
}

/// The two f16 of a word; `halves` says that the device converts them itself.
#[cube]
pub(super) fn two_f16(word: u32, #[comptime] halves: bool) -> (f32, f32) {
    if comptime!(halves) {
        let two = Vector::<f32, Const<2>>::cast_from(Vector::<f16, Const<2>>::reinterpret(word));
        (two.extract(0usize), two.extract(1usize))
    } else {
        (from_f16(word & 0xffff), from_f16(word >> 16))
    }
}

/// Number `index` of a vector of words.
#[cube]
pub(super) fn number(words: Words, #[comptime] index: usize, #[comptime] numbers: Numbers) -> f32 {
    match numbers {
        Numbers::F32 => f32::reinterpret(words.extract(index)),
        Numbers::Bf16 => {
            let word = words.extract(comptime!(index / 2));
            if comptime!(index % 2 == 0) {
                f32::reinterpret(word << 16)
            } else {
                f32::reinterpret(word & 0xffff_0000)
            }
        }
        Numbers::F16 => {
            let word = words.extract(comptime!(index / 2));
            if comptime!(index % 2 == 0) {
                from_f16(word & 0xffff)
            } else {
                from_f16(word >> 16)
            }
        }
    }
}

/// Byte `index` of a word as a number, less `offset`: the bits become the mantissa of 2^23.
#[cube]
pub(super) fn byte(word: u32, #[comptime] index: usize, #[comptime] offset: u32) -> f32 {
    let bits = (word >> comptime!(index as u32 * 8)) & 0xff;
    f32::reinterpret(bits | 0x4b00_0000) - comptime!((8_388_608 + offset) as f32)
}

/// Bits `4 · index` on of a word, less 8, times `16^index`; `index` up to 4.
#[cube]
pub(super) fn raised_nibble(word: u32, #[comptime] index: u32) -> f32 {
    let bits = word & comptime!(0xfu32 << (4 * index));
    f32::reinterpret(bits | 0x4b00_0000) - comptime!((8_388_608u32 + (8u32 << (4 * index))) as f32)
}

/// Four bits of a word as a number, less 8; `index` counts in bytes, `high` picks the upper half.
#[cube]
pub(super) fn nibble(word: u32, #[comptime] index: usize, #[comptime] high: bool) -> f32 {
    let bits = (word >> comptime!(index as u32 * 8 + high as u32 * 4)) & 0xf;
    f32::reinterpret(bits | 0x4b00_0000) - 8_388_616.0
}
