//! Keys and values as plain bytes, for files.

use std::ops::Range;

use burn::tensor::{Bytes, DType, Int, Tensor, TensorData};

use super::key_values::{Codes, KeyValues};

impl KeyValues {
    /// Bytes that `n` positions take in a file.
    pub(crate) fn len_of(&self, n: usize) -> usize {
        let floats = |x: &Tensor<3>| x.dims()[0] * n * x.dims()[2] * x.dtype().size();
        let words = |x: &Tensor<3, Int>| x.dims()[0] * n * x.dims()[2] * x.dtype().size();
        match self {
            Self::Floats { keys, values } => floats(keys) + floats(values),
            Self::Codes { keys, values, .. } => [keys, values]
                .map(|codes| words(&codes.words) + floats(&codes.scales))
                .iter()
                .sum(),
        }
    }

    /// The positions `at`, whole blocks: keys, then values, codes before their scales; each
    /// `[kv_heads, positions, …]`, blocks in the device's own order.
    pub(crate) fn bytes_of(&self, at: Range<usize>) -> Vec<u8> {
        let floats = |x: &Tensor<3>| x.clone().narrow(1, at.start, at.len()).into_data();
        let words = |x: &Tensor<3, Int>| x.clone().narrow(1, at.start, at.len()).into_data();
        let parts = match self {
            Self::Floats { keys, values } => vec![floats(keys), floats(values)],
            Self::Codes { keys, values, .. } => [keys, values]
                .into_iter()
                .flat_map(|codes| [words(&codes.words), floats(&codes.scales)])
                .collect(),
        };
        parts
            .iter()
            .flat_map(TensorData::as_bytes)
            .copied()
            .collect()
    }

    /// With `bytes`, which [`Self::bytes_of`] gave, at the positions `at`.
    pub(crate) fn with_bytes(self, at: Range<usize>, mut bytes: &[u8]) -> Self {
        match self {
            Self::Floats { keys, values } => Self::Floats {
                keys: floats_at(keys, &at, &mut bytes),
                values: floats_at(values, &at, &mut bytes),
            },
            Self::Codes {
                bits,
                head_dim,
                keys,
                values,
            } => Self::Codes {
                bits,
                head_dim,
                keys: codes_at(keys, &at, &mut bytes),
                values: codes_at(values, &at, &mut bytes),
            },
        }
    }
}

fn codes_at(codes: Codes, at: &Range<usize>, bytes: &mut &[u8]) -> Codes {
    let Codes { words, scales } = codes;
    let [heads, _, width] = words.dims();
    let (device, dtype) = (words.device(), words.dtype());
    let new = taken(bytes, [heads, at.len(), width], dtype);
    let new = Tensor::from_data(new, (&device, dtype));
    Codes {
        words: words.slice_assign([0..heads, at.clone(), 0..width], new),
        scales: floats_at(scales, at, bytes),
    }
}

fn floats_at(tensor: Tensor<3>, at: &Range<usize>, bytes: &mut &[u8]) -> Tensor<3> {
    let [heads, _, width] = tensor.dims();
    let (device, dtype) = (tensor.device(), tensor.dtype());
    let new = taken(bytes, [heads, at.len(), width], dtype);
    let new = Tensor::from_data(new, (&device, dtype));
    tensor.slice_assign([0..heads, at.clone(), 0..width], new)
}

/// The next numbers of `bytes`.
fn taken(bytes: &mut &[u8], dims: [usize; 3], dtype: DType) -> TensorData {
    let (own, rest) = bytes.split_at(dims.iter().product::<usize>() * dtype.size());
    *bytes = rest;
    // Words, for the numbers are to be aligned; blocks of positions make whole ones.
    let mut words = vec![0_u32; own.len() / 4];
    bytemuck::cast_slice_mut(&mut words).copy_from_slice(own);
    TensorData::from_bytes(Bytes::from_elems(words), dims, dtype)
}
