//! Vectors of eight and sixteen f32 for the kernels on x86-64: AVX2 with FMA and F16C, and AVX-512.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;

use half::{bf16, f16};

use super::simd::{EXP, LN_2_HIGH, LN_2_LOW, Octet, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(super) __m256);

// SAFETY (every block below): the caller guarantees the instruction set and the pointers, by
// the contract of `Simd`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;
    type Octet = Self;
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm256_setzero_ps()) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Self(_mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> Self {
        unsafe { Self(_mm256_loadu_ps(pointer)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(pointer: *const bf16) -> Self {
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(pointer.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(pointer: *const bf16) -> (Self, Self) {
        unsafe {
            // The upper half of an f32 is its bf16.
            let both = _mm256_loadu_si256(pointer.cast());
            let odd = _mm256_and_si256(both, _mm256_set1_epi32(-0x1_0000));
            (
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both))),
                Self(_mm256_castsi256_ps(odd)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(pointer: *const f16) -> Self {
        unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(pointer.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i8(pointer: *const i8) -> Self {
        unsafe {
            let bytes = _mm_loadl_epi64(pointer.cast());
            Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_i4(pointer: *const u8, shift: u32) -> Self {
        unsafe {
            let bytes = _mm_loadl_epi64(pointer.cast());
            let shifted = _mm_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
            let codes = _mm_and_si128(shifted, _mm_set1_epi8(15));
            let codes = _mm_sub_epi8(codes, _mm_set1_epi8(8));
            Self(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f32) {
        unsafe { _mm256_storeu_ps(pointer, self.0) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, pointer: *mut i8) {
        unsafe {
            let words = _mm256_cvtps_epi32(self.0);
            let (low, high) = (
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            let halves = _mm_packs_epi32(low, high);
            _mm_storel_epi64(pointer.cast(), _mm_packs_epi16(halves, halves));
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { Self(_mm256_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let half = _mm_add_ps(
                _mm256_castps256_ps128(self.0),
                _mm256_extractf128_ps::<1>(self.0),
            );
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)))
        }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { Self(_mm256_max_ps(self.0, b.0)) } // the second operand where one is NaN
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe {
            let half = _mm_max_ps(
                _mm256_castps256_ps128(self.0),
                _mm256_extractf128_ps::<1>(self.0),
            );
            let quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)))
        }
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        unsafe {
            // A NaN is the second operand, which comes through.
            let x = _mm256_max_ps(_mm256_set1_ps(-87.3), self.0);
            let x = _mm256_min_ps(_mm256_set1_ps(88.7), x);
            let power = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm256_mul_ps(x, _mm256_set1_ps(LOG2_E)),
            );
            let r = _mm256_fnmadd_ps(power, _mm256_set1_ps(LN_2_HIGH), x);
            let r = _mm256_fnmadd_ps(power, _mm256_set1_ps(LN_2_LOW), r);
            let mut p = _mm256_set1_ps(EXP[0]);
            for factor in &EXP[1..] {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*factor));
            }
            let bits = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
            let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits));
            let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(self.0, _mm256_set1_ps(-87.3));
            Self(_mm256_and_ps(_mm256_mul_ps(p, scale), normal))
        }
    }
    #[inline(always)]
    fn prefetch<T>(address: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

impl Octet for Avx2 {
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; 8]) {
        // SAFETY: the caller's promise.
        unsafe {
            // Squares of four in each half of the registers, then the halves.
            let mut squares = [_mm256_setzero_ps(); 8];
            for i in [0, 4] {
                let [a, b, c, d] = [rows[i].0, rows[i + 1].0, rows[i + 2].0, rows[i + 3].0];
                let (low_ab, high_ab) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (low_cd, high_cd) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                squares[i] = _mm256_shuffle_ps::<0x44>(low_ab, low_cd);
                squares[i + 1] = _mm256_shuffle_ps::<0xEE>(low_ab, low_cd);
                squares[i + 2] = _mm256_shuffle_ps::<0x44>(high_ab, high_cd);
                squares[i + 3] = _mm256_shuffle_ps::<0xEE>(high_ab, high_cd);
            }
            for i in 0..4 {
                let (upper, lower) = (squares[i], squares[i + 4]);
                rows[i] = Self(_mm256_permute2f128_ps::<0x20>(upper, lower));
                rows[i + 4] = Self(_mm256_permute2f128_ps::<0x31>(upper, lower));
            }
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(super) __m512);

// SAFETY (every block below): as for Avx2.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    const LANES: usize = 16;
    type Octet = Avx2;
    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm512_setzero_ps()) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(pointer)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(pointer: *const bf16) -> Self {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(pointer.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(pointer: *const bf16) -> (Self, Self) {
        unsafe {
            // The upper half of an f32 is its bf16.
            let both = _mm512_loadu_si512(pointer.cast());
            let odd = _mm512_and_si512(both, _mm512_set1_epi32(-0x1_0000));
            (
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both))),
                Self(_mm512_castsi512_ps(odd)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_f16(pointer: *const f16) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(pointer.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i8(pointer: *const i8) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(pointer.cast());
            Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_i4(pointer: *const u8, shift: u32) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(pointer.cast());
            let shifted = _mm_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
            let codes = _mm_and_si128(shifted, _mm_set1_epi8(15));
            let codes = _mm_sub_epi8(codes, _mm_set1_epi8(8));
            Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f32) {
        unsafe { _mm512_storeu_ps(pointer, self.0) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, pointer: *mut i8) {
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0));
            _mm_storeu_si128(pointer.cast(), bytes);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        unsafe { Self(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        unsafe { Self(_mm512_max_ps(self.0, b.0)) } // the second operand where one is NaN
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        unsafe {
            // A NaN is the second operand, which comes through. Below, the result is 0: Intel's
            // processors are slow to make what is subnormal.
            let least = _mm512_set1_ps(-87.3);
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, least);
            let x = _mm512_max_ps(least, self.0);
            let power = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)),
            );
            let r = _mm512_fnmadd_ps(power, _mm512_set1_ps(LN_2_HIGH), x);
            let r = _mm512_fnmadd_ps(power, _mm512_set1_ps(LN_2_LOW), r);
            let mut p = _mm512_set1_ps(EXP[0]);
            for factor in &EXP[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*factor));
            }
            Self(_mm512_maskz_scalef_ps(normal, p, power))
        }
    }
    #[inline(always)]
    fn prefetch<T>(address: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
