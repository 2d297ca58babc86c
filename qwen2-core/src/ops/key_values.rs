//! A page of keys and values of one layer, as floats or as codes, in the order that suits the device.

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::arena::Arena;
use super::codes::{Bits, GROUP, padded};

/// The capacity of a page is a multiple of this: kernels may order positions within such blocks.
pub(crate) const CACHE_BLOCK: usize = 16;
/// Positions of a page, where a cache has several.
pub(crate) const PAGE: usize = 512;

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheFormat {
    /// f32, f16 or bf16.
    Floats(DType),
    Codes(Bits),
}

/// One page of a layer's cache. The positions of a block lie in the order that suits the device: only
/// [`super::append`] writes them, only [`super::attention`] reads them. A clone shares the memory until
/// one of both is written.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // there is one for each layer
pub(crate) enum KeyValues {
    /// `[kv_heads, capacity, head_dim]` each.
    Floats { keys: Tensor<3>, values: Tensor<3> },
    Codes {
        bits: Bits,
        head_dim: usize,
        keys: Codes,
        values: Codes,
    },
}

/// Codes of keys or of values with their scales.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    /// `[kv_heads, capacity, words]` i32.
    pub(crate) words: Tensor<3, Int>,
    /// `[kv_heads, capacity, groups]`.
    pub(crate) scales: Tensor<3>,
}

impl CacheFormat {
    /// Bytes of a key, or of a value.
    pub(crate) fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Floats(dtype) => head_dim * dtype.size(),
            Self::Codes(bits) => bits.row_bytes(head_dim),
        }
    }
}

/// Zeros of an arena; nothing where the system has no memory for it, or the tensor lives elsewhere.
fn zeros_of(arena: &mut Arena, dims: [usize; 3], dtype: DType) -> Option<TensorData> {
    #[cfg(feature = "cpu")]
    {
        let len = dims.iter().product::<usize>() * dtype.size();
        let bytes = super::cpu::room::zeros(arena, len).ok()?;
        Some(TensorData::from_bytes(bytes, dims, dtype))
    }
    #[cfg(not(feature = "cpu"))]
    {
        let _ = (arena, dims, dtype);
        None
    }
}

impl KeyValues {
    /// Room for `capacity` positions, all zero.
    #[cfg(any(test, feature = "gpu"))]
    pub(crate) fn zeros(format: CacheFormat, dims: [usize; 3], device: &Device) -> Self {
        Self::zeros_in(None, format, dims, device)
    }

    /// Room for `capacity` positions, all zero, in an arena where there is one.
    pub(crate) fn zeros_in(
        mut arena: Option<&mut Arena>,
        format: CacheFormat,
        [kv_heads, capacity, head_dim]: [usize; 3],
        device: &Device,
    ) -> Self {
        let dims = |width| [kv_heads, capacity, width];
        let mut taken = |width, dtype| zeros_of(arena.as_deref_mut()?, dims(width), dtype);
        let mut floats = |width, dtype| {
            let zeros = || super::settled(Tensor::zeros(dims(width), (device, dtype)));
            taken(width, dtype).map_or_else(zeros, |data| Tensor::from_data(data, (device, dtype)))
        };
        match format {
            CacheFormat::Floats(dtype) => Self::Floats {
                keys: floats(head_dim, dtype),
                values: floats(head_dim, dtype),
            },
            CacheFormat::Codes(bits) => {
                let width = padded(head_dim);
                // bf16 is the kernels' choice; burn's GPU backends do not all have it.
                let dtype = match *device == Device::flex() {
                    true => DType::BF16,
                    false => DType::F32,
                };
                let [key_scales, value_scales] = [(); 2].map(|()| floats(width / GROUP, dtype));
                let mut codes = |scales| {
                    let (width, on) = (bits.words(width), (device, DType::I32));
                    let words = taken(width, DType::I32).map_or_else(
                        || Tensor::zeros(dims(width), on),
                        |data| Tensor::from_data(data, on),
                    );
                    Codes { words, scales }
                };
                Self::Codes {
                    bits,
                    head_dim,
                    keys: codes(key_scales),
                    values: codes(value_scales),
                }
            }
        }
    }

    /// Positions that it has room for.
    pub(crate) fn capacity(&self) -> usize {
        match self {
            Self::Floats { keys, .. } => keys.dims()[1],
            Self::Codes { keys, .. } => keys.words.dims()[1],
        }
    }

    /// Elements of a key.
    pub(crate) fn head_dim(&self) -> usize {
        match self {
            Self::Floats { keys, .. } => keys.dims()[2],
            Self::Codes { head_dim, .. } => *head_dim,
        }
    }

    /// Heads of keys.
    pub(crate) fn kv_heads(&self) -> usize {
        match self {
            Self::Floats { keys, .. } => keys.dims()[0],
            Self::Codes { keys, .. } => keys.words.dims()[0],
        }
    }

    /// Writes the positions of `old` from `start` on, whole blocks, to the positions `at` of this one.
    pub(crate) fn take_over(self, old: Self, start: usize, at: Range<usize>) -> Self {
        match (self, old) {
            (
                Self::Floats { keys, values },
                Self::Floats {
                    keys: old_keys,
                    values: old_values,
                },
            ) => Self::Floats {
                keys: copied(keys, old_keys, start, at.clone()),
                values: copied(values, old_values, start, at),
            },
            (
                Self::Codes {
                    bits,
                    head_dim,
                    keys,
                    values,
                },
                Self::Codes {
                    keys: old_keys,
                    values: old_values,
                    ..
                },
            ) => Self::Codes {
                bits,
                head_dim,
                keys: keys.take_over(old_keys, start, at.clone()),
                values: values.take_over(old_values, start, at),
            },
            _ => unreachable!("a cache keeps its format"),
        }
    }
}

impl Codes {
    fn take_over(self, old: Self, start: usize, at: Range<usize>) -> Self {
        let rows = old.words.narrow(1, start, at.len());
        let [heads, _, width] = self.words.dims();
        Self {
            words: self
                .words
                .slice_assign([0..heads, at.clone(), 0..width], rows),
            scales: copied(self.scales, old.scales, start, at),
        }
    }
}

fn copied(new: Tensor<3>, old: Tensor<3>, start: usize, at: Range<usize>) -> Tensor<3> {
    let [heads, _, width] = new.dims();
    let rows = old.narrow(1, start, at.len());
    new.slice_assign([0..heads, at, 0..width], rows)
}
