//! The scale of a block of weights, with AVX2 where it is there.

use half::f16;

use crate::ops::fit::{Effort, quantize_kernel};
use crate::ops::packed::{BLOCK, Format};

/// Scale and quants of a block.
pub(crate) fn quantize(format: Format, effort: Effort, x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(format: Format, effort: Effort, x: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
            quantize_kernel(format, effort, x)
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instruction set is there.
            return unsafe { avx2(format, effort, x) };
        }
    }
    quantize_kernel(format, effort, x)
}
