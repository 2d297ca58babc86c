//! Vectors of eight f32 for the kernels on aarch64: two NEON registers.
#![cfg(target_arch = "aarch64")]

use std::arch::aarch64::*;
use std::arch::asm;
use std::f32::consts::LOG2_E;

use half::{bf16, f16};

use super::simd::{EXP, LN_2_HIGH, LN_2_LOW, Octet, Simd};

/// Every aarch64 with an operating system has these instructions, f16's conversions among them.
#[derive(Clone, Copy)]
pub(crate) struct Neon(float32x4_t, float32x4_t);

impl Neon {
    /// # Safety
    /// NEON is present.
    #[inline(always)]
    unsafe fn of_bytes(bytes: int8x8_t) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let words = vmovl_s8(bytes);
            let (low, high) = (vmovl_s16(vget_low_s16(words)), vmovl_high_s16(words));
            Self(vcvtq_f32_s32(low), vcvtq_f32_s32(high))
        }
    }
}

impl Octet for Neon {}

// SAFETY (every block below): the caller guarantees the instruction set and the pointers, by the
// contract of `Simd`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Neon {
    const LANES: usize = 8;
    type Octet = Self;
    const REGISTERS: usize = 2;
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Self(vdupq_n_f32(value), vdupq_n_f32(value)) }
    }
    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> Self {
        unsafe { Self(vld1q_f32(pointer), vld1q_f32(pointer.add(4))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(pointer: *const bf16) -> Self {
        unsafe {
            // The upper half of an f32 is its bf16.
            let (zero, bits) = (vdupq_n_u16(0), vld1q_u16(pointer.cast()));
            Self(
                vreinterpretq_f32_u16(vzip1q_u16(zero, bits)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, bits)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(pointer: *const bf16) -> (Self, Self) {
        unsafe {
            let (first, second) = (
                vreinterpretq_u32_u16(vld1q_u16(pointer.cast())),
                vreinterpretq_u32_u16(vld1q_u16(pointer.add(8).cast())),
            );
            let even = |both| vreinterpretq_f32_u32(vshlq_n_u32::<16>(both));
            let odd = |both| vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xFFFF_0000)));
            (
                Self(even(first), even(second)),
                Self(odd(first), odd(second)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(pointer: *const f16) -> Self {
        unsafe {
            let halves = vreinterpretq_f16_u16(vld1q_u16(pointer.cast()));
            Self(
                vcvt_f32_f16(vget_low_f16(halves)),
                vcvt_high_f32_f16(halves),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(pointer: *const i8) -> Self {
        unsafe { Self::of_bytes(vld1_s8(pointer)) }
    }
    #[inline(always)]
    unsafe fn load_i4(pointer: *const u8, shift: u32) -> Self {
        unsafe {
            // A shift to the left by less than nothing.
            let shifted = vshl_u8(vld1_u8(pointer), vdup_n_s8(-(shift as i8)));
            let codes = vreinterpret_s8_u8(vand_u8(shifted, vdup_n_u8(15)));
            Self::of_bytes(vsub_s8(codes, vdup_n_s8(8)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f32) {
        unsafe {
            vst1q_f32(pointer, self.0);
            vst1q_f32(pointer.add(4), self.1);
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, pointer: *mut i8) {
        unsafe {
            let low = vqmovn_s32(vcvtq_s32_f32(self.0));
            let words = vqmovn_high_s32(low, vcvtq_s32_f32(self.1));
            vst1_s8(pointer, vqmovn_s16(words));
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { Self(vfmaq_f32(c.0, self.0, b.0), vfmaq_f32(c.1, self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { Self(vaddq_f32(self.0, b.0), vaddq_f32(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { Self(vmulq_f32(self.0, b.0), vmulq_f32(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { vaddvq_f32(vaddq_f32(self.0, self.1)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe {
            // `vmaxq_f32` gives NaN where either is, `vmaxnmq_f32` where both are.
            let larger = |a, b| vbslq_f32(vcgtq_f32(a, b), a, b);
            Self(larger(self.0, b.0), larger(self.1, b.1))
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(self.0, self.1)) }
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        #[inline(always)]
        unsafe fn exp(x: float32x4_t) -> float32x4_t {
            unsafe {
                // A NaN comes through both.
                let bounded = vmaxq_f32(x, vdupq_n_f32(-87.3));
                let bounded = vminq_f32(bounded, vdupq_n_f32(88.7));
                let power = vrndnq_f32(vmulq_f32(bounded, vdupq_n_f32(LOG2_E)));
                let r = vfmsq_f32(bounded, power, vdupq_n_f32(LN_2_HIGH));
                let r = vfmsq_f32(r, power, vdupq_n_f32(LN_2_LOW));
                let mut p = vdupq_n_f32(EXP[0]);
                for factor in &EXP[1..] {
                    p = vfmaq_f32(vdupq_n_f32(*factor), p, r);
                }
                let bits = vaddq_s32(vcvtq_s32_f32(power), vdupq_n_s32(127));
                let scale = vreinterpretq_f32_s32(vshlq_n_s32::<23>(bits));
                let result = vreinterpretq_u32_f32(vmulq_f32(p, scale));
                let subnormal = vcltq_f32(x, vdupq_n_f32(-87.3));
                vreinterpretq_f32_u32(vbicq_u32(result, subnormal))
            }
        }
        unsafe { Self(exp(self.0), exp(self.1)) }
    }
    #[inline(always)]
    fn prefetch<T>(address: *const T) {
        // A hint; it never faults. (The intrinsic is not stable yet.)
        unsafe {
            asm!(
                "prfm pldl1keep, [{address}]",
                address = in(reg) address,
                options(readonly, nostack, preserves_flags),
            );
        }
    }
}
