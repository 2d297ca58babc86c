//! What keys and values are kept in.

use std::fmt;
use std::str::FromStr;

use super::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::codes::Bits;

/// How a cache keeps keys and values; scores and sums are f32 in any case.
///
/// `Q8` and `Q4` share a scale among 32 elements (8.5 and 4.5 bits an element on the CPU); keys are
/// turned by a Hadamard matrix before (arXiv:2404.00456), queries alike, so that the few large
/// channels of Qwen2's keys do not take the range of the others.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCacheType {
    /// As computed.
    F32,
    /// What is beyond ±65504 becomes that.
    F16,
    /// Rounded to eight bits of mantissa.
    BF16,
    /// Eight bits and a scale for 32 elements.
    Q8,
    /// Four bits and a scale for 32 elements.
    Q4,
}

impl KvCacheType {
    /// `f32`, `f16`, `bf16`, `q8` or `q4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// Bytes of a key, or of a value, of `head_dim` elements.
    pub(super) fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F32 => head_dim * 4,
            Self::F16 | Self::BF16 => head_dim * 2,
            Self::Q8 => Bits::Eight.row_bytes(head_dim),
            Self::Q4 => Bits::Four.row_bytes(head_dim),
        }
    }
}

impl From<DType> for KvCacheType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

impl fmt::Display for KvCacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvCacheType {
    type Err = Error;

    /// # Errors
    /// `InvalidArgument` for an unknown name.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "q8" => Ok(Self::Q8),
            "q4" => Ok(Self::Q4),
            _ => name.parse::<DType>().map(Self::from).map_err(|_| {
                Error::new(ErrorKind::InvalidArgument, "unknown kind of cache")
                    .with_key("kv_cache")
                    .with_why(name)
                    .with_help("f32, f16, bf16, q8 and q4 are known")
            }),
        }
    }
}
