//! How the keys and values of a layer lie in memory, as floats or as codes with scales, and how
//! kernels read and write them.
//!
//! Keys lie in blocks of 16 positions, `[kv_heads, capacity / 16, width, 16]`: a vector holds one
//! element of 16 keys, and no sum runs across a vector. Values lie position by position,
//! `[kv_heads, capacity, width]`. The width of floats is `head_dim`, that of codes whole groups.
//! Scales of codes lie in the same order, one for each group in place of its elements.

use std::ops::Range;

use half::bf16;

use super::pool::{self, Streams};
use super::simd::{Simd, Stored};
use crate::ops::codes::{self, Bits, GROUP, encode, padded};

/// Positions of one block of keys; the capacity of a cache is a multiple of it.
pub(crate) const BLOCK: usize = 16;
/// Positions whose values are asked for ahead of their use.
const AHEAD: usize = 64;

/// The dimensions of the keys, and of the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) kv_heads: usize,
    pub(crate) capacity: usize,
    pub(crate) head_dim: usize,
}

/// The keys and values of one layer as kernels read them. A row is a position of a head, counted
/// through: `head · capacity + position`.
///
/// # Safety
/// Of the unsafe functions: the instruction set of `S` is present, and rows, lanes and elements lie
/// inside the buffers that [`Layout::check`] passed.
pub(crate) trait Layout: Copy + Sync {
    /// Whether elements are codes, to be multiplied by the scale of their group.
    const SCALED: bool;
    fn dims(self) -> Dims;
    /// Elements of a key or a value.
    fn width(self) -> usize;
    /// Brings a query of that width into the basis that keys are kept in.
    fn turn(query: &mut [f32]);
    /// # Panics
    /// If the buffers have not the length that the dimensions tell.
    fn check(self);
    /// Element `k` of the keys of `LANES` rows from `row` on, a multiple of `LANES`.
    unsafe fn key<S: Simd>(self, row: usize, k: usize) -> S;
    /// What [`Self::key`] of group `group` is to be multiplied by.
    unsafe fn key_scale<S: Simd>(self, row: usize, group: usize) -> S;
    /// `LANES` elements of the value of `row` from `k` on, a multiple of `LANES`.
    unsafe fn value<S: Simd>(self, row: usize, k: usize) -> S;
    /// What [`Self::value`] of group `group` is to be multiplied by.
    unsafe fn value_scale(self, row: usize, group: usize) -> f32;
    /// Element `k` of the value of `row`.
    unsafe fn value_at(self, row: usize, k: usize) -> f32;
    /// Asks for the keys that lie `ahead` elements behind the start of the block of `row`.
    fn prefetch_key<S: Simd>(self, row: usize, ahead: usize);
    /// Asks for what [`Self::value`] reads some rows on.
    fn prefetch_value<S: Simd>(self, row: usize, k: usize);
    /// Where the keys and the values of some rows lie.
    fn streams(self, rows: Range<usize>) -> Streams;
}

/// Keys and values of one head that take new positions.
///
/// # Panics
/// If a position is outside the cache.
pub(crate) trait Writer: Send {
    fn key(&mut self, position: usize, key: &[f32]);
    fn value(&mut self, position: usize, value: &[f32]);
}

/// A cache of floats.
#[derive(Clone, Copy)]
pub(crate) struct Floats<'a, W> {
    pub(crate) dims: Dims,
    pub(crate) keys: &'a [W],
    pub(crate) values: &'a [W],
}

impl<W: Stored> Layout for Floats<'_, W> {
    const SCALED: bool = false;

    #[inline(always)]
    fn dims(self) -> Dims {
        self.dims
    }

    #[inline(always)]
    fn width(self) -> usize {
        self.dims.head_dim
    }

    #[inline(always)]
    fn turn(_: &mut [f32]) {}

    fn check(self) {
        let Dims {
            kv_heads,
            capacity,
            head_dim,
        } = self.dims;
        assert_eq!(capacity % BLOCK, 0, "capacity in blocks");
        assert_eq!(
            self.keys.len(),
            kv_heads * capacity * head_dim,
            "cache length"
        );
        assert_eq!(self.keys.len(), self.values.len(), "cache length");
    }

    #[inline(always)]
    unsafe fn key<S: Simd>(self, row: usize, k: usize) -> S {
        let at = row / BLOCK * BLOCK * self.width() + k * BLOCK + row % BLOCK;
        // SAFETY: the caller's promise.
        unsafe { W::load(self.keys.as_ptr().add(at)) }
    }

    #[inline(always)]
    unsafe fn key_scale<S: Simd>(self, _: usize, _: usize) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::splat(1.0) }
    }

    #[inline(always)]
    unsafe fn value<S: Simd>(self, row: usize, k: usize) -> S {
        // SAFETY: the caller's promise.
        unsafe { W::load(self.values.as_ptr().add(row * self.width() + k)) }
    }

    #[inline(always)]
    unsafe fn value_scale(self, _: usize, _: usize) -> f32 {
        1.0
    }

    #[inline(always)]
    unsafe fn value_at(self, row: usize, k: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { (*self.values.as_ptr().add(row * self.width() + k)).to_f32() }
    }

    #[inline(always)]
    fn prefetch_key<S: Simd>(self, row: usize, ahead: usize) {
        S::prefetch(self.keys.as_ptr().wrapping_add(row * self.width() + ahead));
    }

    #[inline(always)]
    fn prefetch_value<S: Simd>(self, row: usize, k: usize) {
        let at = (row + AHEAD) * self.width() + k;
        S::prefetch(self.values.as_ptr().wrapping_add(at));
    }

    fn streams(self, rows: Range<usize>) -> Streams {
        let part = rows.start * self.width()..rows.end * self.width();
        pool::streams(&self.keys[part.clone()], &self.values[part])
    }
}

/// One head of a cache of floats.
pub(crate) struct FloatsWriter<'a, W> {
    pub(crate) head_dim: usize,
    pub(crate) keys: &'a mut [W],
    pub(crate) values: &'a mut [W],
}

impl<W: Stored> Writer for FloatsWriter<'_, W> {
    fn key(&mut self, position: usize, key: &[f32]) {
        let block = &mut self.keys[position / BLOCK * BLOCK * self.head_dim..];
        let lanes = block[..BLOCK * self.head_dim].chunks_exact_mut(BLOCK);
        for (lanes, key) in lanes.zip(key) {
            lanes[position % BLOCK] = W::from_f32(*key);
        }
    }

    fn value(&mut self, position: usize, value: &[f32]) {
        let row = &mut self.values[position * self.head_dim..][..self.head_dim];
        for (out, value) in row.iter_mut().zip(value) {
            *out = W::from_f32(*value);
        }
    }
}

/// Codes with their scales, of keys or of values.
#[derive(Clone, Copy)]
pub(crate) struct Coded<'a> {
    /// Eight bits: a byte each. Four bits: a byte holds two elements of a key side by side, or two
    /// of a value 16 apart, the lower four bits the first; they hold the code plus 8.
    pub(crate) codes: &'a [u8],
    pub(crate) scales: &'a [bf16],
}

/// A cache of codes: `BITS` is 8 or 4.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a, const BITS: usize> {
    pub(crate) dims: Dims,
    pub(crate) keys: Coded<'a>,
    pub(crate) values: Coded<'a>,
}

impl<const BITS: usize> Codes<'_, BITS> {
    /// Bytes of the codes of one row.
    #[inline(always)]
    fn row_bytes(self) -> usize {
        self.width() * BITS / 8
    }

    /// Where a vector of a value lies, and by how many bits it is to be shifted.
    #[inline(always)]
    fn value_place(self, row: usize, k: usize) -> (*const u8, u32) {
        let start = self
            .values
            .codes
            .as_ptr()
            .wrapping_add(row * self.row_bytes());
        if BITS == 8 {
            return (start.wrapping_add(k), 0);
        }
        let byte = k / GROUP * (GROUP / 2) + k % (GROUP / 2);
        let second = k % GROUP >= GROUP / 2;
        (start.wrapping_add(byte), if second { 4 } else { 0 })
    }

    /// `LANES` codes.
    ///
    /// # Safety
    /// As [`Layout::key`].
    #[inline(always)]
    unsafe fn load<S: Simd>(place: *const u8, shift: u32) -> S {
        // SAFETY: the caller's promise.
        unsafe {
            if BITS == 8 {
                S::load_i8(place.cast())
            } else {
                S::load_i4(place, shift)
            }
        }
    }
}

impl<const BITS: usize> Layout for Codes<'_, BITS> {
    const SCALED: bool = true;

    #[inline(always)]
    fn dims(self) -> Dims {
        self.dims
    }

    #[inline(always)]
    fn width(self) -> usize {
        padded(self.dims.head_dim)
    }

    #[inline(always)]
    fn turn(query: &mut [f32]) {
        codes::turn(query);
    }

    fn check(self) {
        let Dims {
            kv_heads, capacity, ..
        } = self.dims;
        assert_eq!(capacity % BLOCK, 0, "capacity in blocks");
        let rows = kv_heads * capacity;
        for coded in [self.keys, self.values] {
            assert_eq!(coded.codes.len(), rows * self.row_bytes(), "cache length");
            assert_eq!(coded.scales.len(), rows * self.width() / GROUP, "scales");
        }
    }

    #[inline(always)]
    unsafe fn key<S: Simd>(self, row: usize, k: usize) -> S {
        let (line, shift) = if BITS == 8 {
            (k, 0)
        } else {
            (k / 2, (k % 2 * 4) as u32)
        };
        let at = row / BLOCK * BLOCK * self.row_bytes() + line * BLOCK + row % BLOCK;
        // SAFETY: the caller's promise.
        unsafe { Self::load(self.keys.codes.as_ptr().add(at), shift) }
    }

    #[inline(always)]
    unsafe fn key_scale<S: Simd>(self, row: usize, group: usize) -> S {
        let groups = self.width() / GROUP;
        let at = row / BLOCK * BLOCK * groups + group * BLOCK + row % BLOCK;
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(self.keys.scales.as_ptr().add(at)) }
    }

    #[inline(always)]
    unsafe fn value<S: Simd>(self, row: usize, k: usize) -> S {
        let (place, shift) = self.value_place(row, k);
        // SAFETY: the caller's promise.
        unsafe { Self::load(place, shift) }
    }

    #[inline(always)]
    unsafe fn value_scale(self, row: usize, group: usize) -> f32 {
        let at = row * (self.width() / GROUP) + group;
        // SAFETY: the caller's promise.
        unsafe { Stored::to_f32(*self.values.scales.as_ptr().add(at)) }
    }

    #[inline(always)]
    unsafe fn value_at(self, row: usize, k: usize) -> f32 {
        let (place, shift) = self.value_place(row, k);
        // SAFETY: the caller's promise.
        unsafe {
            let code = if BITS == 8 {
                f32::from((*place).cast_signed())
            } else {
                f32::from(*place >> shift & 15) - 8.0
            };
            code * self.value_scale(row, k / GROUP)
        }
    }

    #[inline(always)]
    fn prefetch_key<S: Simd>(self, row: usize, ahead: usize) {
        let at = row * self.row_bytes() + ahead * BITS / 8;
        S::prefetch(self.keys.codes.as_ptr().wrapping_add(at));
    }

    #[inline(always)]
    fn prefetch_value<S: Simd>(self, row: usize, k: usize) {
        S::prefetch(self.value_place(row + AHEAD, k).0);
    }

    fn streams(self, rows: Range<usize>) -> Streams {
        let part = rows.start * self.row_bytes()..rows.end * self.row_bytes();
        pool::streams(&self.keys.codes[part.clone()], &self.values.codes[part])
    }
}

/// Codes with their scales that take new ones.
pub(crate) struct CodedMut<'a> {
    pub(crate) codes: &'a mut [u8],
    pub(crate) scales: &'a mut [bf16],
}

/// One head of a cache of codes.
pub(crate) struct CodesWriter<'a> {
    pub(crate) bits: Bits,
    pub(crate) head_dim: usize,
    pub(crate) keys: CodedMut<'a>,
    pub(crate) values: CodedMut<'a>,
}

impl CodesWriter<'_> {
    /// The groups of a row, the last padded.
    fn groups(row: &[f32]) -> impl Iterator<Item = [f32; GROUP]> + '_ {
        row.chunks(GROUP).map(|part| {
            let mut group = [0.0; GROUP];
            group[..part.len()].copy_from_slice(part);
            group
        })
    }

    /// A code of four bits in one half of a byte, the other left as it is.
    fn set_half(byte: &mut u8, code: i8, shift: usize) {
        let bits = ((code + 8) as u8) << shift;
        *byte = *byte & (0xf0 >> shift) | bits;
    }
}

impl Writer for CodesWriter<'_> {
    fn key(&mut self, position: usize, key: &[f32]) {
        let width = padded(self.head_dim);
        let (groups, lane) = (width / GROUP, position % BLOCK);
        let start = position / BLOCK * BLOCK;
        let row_bytes = width * self.bits.count() / 8;
        let codes = &mut self.keys.codes[start * row_bytes..][..BLOCK * row_bytes];
        let scales = &mut self.keys.scales[start * groups..][..BLOCK * groups];
        for (g, mut group) in Self::groups(key).enumerate() {
            codes::turn(&mut group);
            let (new, scale) = encode(self.bits, &group);
            scales[g * BLOCK + lane] = scale;
            for (k, code) in (g * GROUP..).zip(new) {
                match self.bits {
                    Bits::Eight => codes[k * BLOCK + lane] = code.cast_unsigned(),
                    Bits::Four => {
                        Self::set_half(&mut codes[k / 2 * BLOCK + lane], code, k % 2 * 4);
                    }
                }
            }
        }
    }

    fn value(&mut self, position: usize, value: &[f32]) {
        let width = padded(self.head_dim);
        let groups = width / GROUP;
        let row_bytes = width * self.bits.count() / 8;
        let codes = &mut self.values.codes[position * row_bytes..][..row_bytes];
        let scales = &mut self.values.scales[position * groups..][..groups];
        let places = codes.chunks_exact_mut(row_bytes / groups).zip(scales);
        for ((codes, place), group) in places.zip(Self::groups(value)) {
            let (new, scale) = encode(self.bits, &group);
            *place = scale;
            for (k, code) in new.into_iter().enumerate() {
                match self.bits {
                    Bits::Eight => codes[k] = code.cast_unsigned(),
                    Bits::Four => {
                        Self::set_half(&mut codes[k % (GROUP / 2)], code, k / (GROUP / 2) * 4);
                    }
                }
            }
        }
    }
}
