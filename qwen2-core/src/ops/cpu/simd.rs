//! Vectors of f32 for the kernels: AVX-512, AVX2 with FMA, NEON, or plain Rust, chosen once per process.

use std::sync::OnceLock;

use half::{bf16, f16};

/// The instruction set that the kernels of this process use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    Portable,
    Avx2,
    /// AVX2 with integer dot products.
    AvxVnni,
    Avx512,
    /// AVX-512 with integer dot products.
    Avx512Vnni,
    /// The same, with AVX512-BF16 and AMX's matrix products of bf16.
    Amx,
    /// What every aarch64 has.
    Neon,
    /// NEON with integer dot products.
    NeonDot,
    /// NEON with integer dot products and matrix products.
    NeonI8mm,
}

impl Isa {
    /// The plainest first.
    const ALL: [Self; 9] = [
        Self::Portable,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Amx,
        Self::Neon,
        Self::NeonDot,
        Self::NeonI8mm,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonDot => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
        }
    }

    /// `LANES` of its vectors.
    pub(crate) fn lanes(self) -> usize {
        match self {
            Self::Avx512 | Self::Avx512Vnni | Self::Amx => 16,
            _ => 8,
        }
    }

    /// Every instruction set that this machine can run, the plainest first.
    pub(crate) fn available() -> Vec<Self> {
        Self::ALL
            .into_iter()
            .filter(|isa| isa.is_present())
            .collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn is_present(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        let avx512 = || {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
        };
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2(),
            Self::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
            Self::Avx512 => avx512(),
            Self::Avx512Vnni => avx512() && is_x86_feature_detected!("avx512vnni"),
            Self::Amx => {
                Self::Avx512Vnni.is_present()
                    && is_x86_feature_detected!("avx512bf16")
                    && super::amx::is_present()
            }
            Self::Neon | Self::NeonDot | Self::NeonI8mm => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn is_present(self) -> bool {
        use std::arch::is_aarch64_feature_detected;
        // The kernels take bytes as numbers of several bytes.
        let neon = || cfg!(target_endian = "little") && is_aarch64_feature_detected!("neon");
        let dot = || neon() && is_aarch64_feature_detected!("dotprod");
        match self {
            Self::Portable => true,
            Self::Neon => neon(),
            Self::NeonDot => dot(),
            Self::NeonI8mm => dot() && is_aarch64_feature_detected!("i8mm"),
            Self::Avx2 | Self::AvxVnni | Self::Avx512 | Self::Avx512Vnni | Self::Amx => false,
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_present(self) -> bool {
        self == Self::Portable
    }

    /// The best one present, or the one that the variable `QWEN2_CPU` names if it is present.
    pub(crate) fn selected() -> Self {
        static SELECTED: OnceLock<Isa> = OnceLock::new();
        *SELECTED.get_or_init(|| {
            let available = Self::available();
            let best = available.last().copied().unwrap_or(Self::Portable);
            let Ok(wanted) = std::env::var("QWEN2_CPU") else {
                return best;
            };
            match available.iter().find(|isa| isa.name() == wanted) {
                Some(&isa) => isa,
                None => {
                    tracing::warn!(
                        wanted,
                        used = best.name(),
                        "QWEN2_CPU names no instruction set of this machine"
                    );
                    best
                }
            }
        })
    }
}

/// A vector of `LANES` f32.
///
/// # Safety
/// Every function requires the instruction set of the implementation; the loads and stores read
/// and write `LANES` elements at the pointer, which needs the alignment of its element only.
pub(crate) trait Simd: Copy {
    const LANES: usize;
    /// The vector of eight that goes with it.
    type Octet: Octet;
    /// Registers of the machine that one takes.
    const REGISTERS: usize = 1;
    unsafe fn zero() -> Self;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(pointer: *const f32) -> Self;
    unsafe fn load_bf16(pointer: *const bf16) -> Self;
    /// Of `2 · LANES` elements those at even places and those at odd ones.
    unsafe fn load_bf16_pair(pointer: *const bf16) -> (Self, Self);
    unsafe fn load_f16(pointer: *const f16) -> Self;
    unsafe fn load_i8(pointer: *const i8) -> Self;
    /// Bits `shift..shift + 4` of each of `LANES` bytes, less 8.
    unsafe fn load_i4(pointer: *const u8, shift: u32) -> Self;
    unsafe fn store(self, pointer: *mut f32);
    /// Stores integers in -128..=127 as bytes.
    unsafe fn store_i8(self, pointer: *mut i8);
    /// `self · b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn sum(self) -> f32;
    /// The larger of each pair; that of `b` where the own one is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// The largest.
    unsafe fn largest(self) -> f32;
    /// As [`exp`]; what is subnormal there may be 0.
    unsafe fn exp(self) -> Self;
    /// Asks for the cache line of an address, which need not be valid.
    fn prefetch<T>(address: *const T);
}

/// A vector of eight.
///
/// # Safety
/// As [`Simd`].
pub(crate) trait Octet: Simd {
    /// Rows become columns.
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self; 8]) {
        let (mut square, mut column) = ([[0.0; 8]; 8], [0.0; 8]);
        // SAFETY: the caller's promise; a vector has eight elements.
        unsafe {
            for (to, row) in square.iter_mut().zip(&*rows) {
                row.store(to.as_mut_ptr());
            }
            for (i, to) in rows.iter_mut().enumerate() {
                for (element, row) in column.iter_mut().zip(&square) {
                    *element = row[i];
                }
                *to = Self::load(column.as_ptr());
            }
        }
    }
}

/// Asks for a cache line into the second level, by an address that need not be valid.
pub(crate) fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint; it never faults.
    unsafe {
        std::arch::asm!(
            "prfm pldl2keep, [{address}]",
            address = in(reg) address,
            options(readonly, nostack, preserves_flags),
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// An element type that weights and caches are stored in.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    fn to_f32(self) -> f32;
    /// To nearest; what is beyond the range becomes the largest finite number, NaN stays NaN.
    fn from_f32(value: f32) -> Self;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(pointer: *const Self) -> S;
    /// Whether [`Self::load_pair`] tells even places from odd ones, which takes half the work.
    const SPLITS: bool = false;
    /// `2 · LANES` elements: the first and the second `LANES`, or those at even and at odd places.
    ///
    /// # Safety
    /// As [`Simd::load`], for twice as many.
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(pointer: *const Self) -> (S, S) {
        // SAFETY: the caller's promise.
        unsafe { (Self::load(pointer), Self::load(pointer.add(S::LANES))) }
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(pointer: *const Self) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load(pointer) }
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(pointer: *const Self) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(pointer) }
    }
    const SPLITS: bool = true;
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(pointer: *const Self) -> (S, S) {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16_pair(pointer) }
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value.clamp(-65504.0, 65504.0))
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(pointer: *const Self) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(pointer) }
    }
}

/// Eight f32 in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Octet for Portable {}

impl Simd for Portable {
    const LANES: usize = 8;
    type Octet = Self;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 8])
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn load(pointer: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Self(std::array::from_fn(|i| unsafe { *pointer.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_bf16(pointer: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        Self(std::array::from_fn(|i| unsafe {
            Stored::to_f32(*pointer.add(i))
        }))
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(pointer: *const bf16) -> (Self, Self) {
        // SAFETY: the caller's promise.
        let at = |i: usize| unsafe { Stored::to_f32(*pointer.add(i)) };
        let (even, odd) = (
            std::array::from_fn(|i| at(2 * i)),
            std::array::from_fn(|i| at(2 * i + 1)),
        );
        (Self(even), Self(odd))
    }
    #[inline(always)]
    unsafe fn load_f16(pointer: *const f16) -> Self {
        // SAFETY: the caller's promise.
        Self(std::array::from_fn(|i| unsafe {
            f16::to_f32_const(*pointer.add(i))
        }))
    }
    #[inline(always)]
    unsafe fn load_i8(pointer: *const i8) -> Self {
        Self(std::array::from_fn(|i| {
            // SAFETY: the caller's promise.
            f32::from(unsafe { *pointer.add(i) })
        }))
    }
    #[inline(always)]
    unsafe fn load_i4(pointer: *const u8, shift: u32) -> Self {
        // SAFETY: the caller's promise.
        let byte = |i: usize| unsafe { *pointer.add(i) };
        Self(std::array::from_fn(|i| {
            f32::from(byte(i) >> shift & 15) - 8.0
        }))
    }
    #[inline(always)]
    unsafe fn store(self, pointer: *mut f32) {
        for (i, value) in self.0.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *pointer.add(i) = value };
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, pointer: *mut i8) {
        for (i, value) in self.0.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *pointer.add(i) = value as i8 };
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        let larger = |i: usize| {
            if self.0[i] > b.0[i] {
                self.0[i]
            } else {
                b.0[i]
            }
        };
        Self(std::array::from_fn(larger))
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let larger = |max, x| if x > max { x } else { max };
        self.0.into_iter().fold(f32::NEG_INFINITY, larger)
    }
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        Self(self.0.map(exp))
    }
    #[inline(always)]
    fn prefetch<T>(_: *const T) {}
}

/// ln 2 in two parts (Cody and Waite), so that a remainder keeps all its bits.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) const LN_2_HIGH: f32 = 0.693_359_4;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Cephes' expf on [-ln 2 / 2, ln 2 / 2], highest power first.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) const EXP: [f32; 8] = [
    1.987_569_1e-4,
    1.398_2e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
    1.0,
    1.0,
];

#[cfg(target_arch = "aarch64")]
pub(crate) use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
pub(crate) use super::x86::{Avx2, Avx512};

/// Defines `$name`, which runs the generic `$kernel` with the vectors of an instruction set.
///
/// The kernel is inlined into a function that has the instruction set enabled, so that it is
/// compiled for it. The caller must only pass what [`Isa::available`] listed.
macro_rules! per_isa {
    ($visible:vis $name:ident, $kernel:ident $(<$t:ident: $bound:path>)?, ($($arg:ident : $ty:ty),* $(,)?) $(-> $out:ty)?) => {
        #[allow(clippy::too_many_arguments)]
        $visible fn $name$(<$t: $bound>)?(isa: $crate::ops::cpu::simd::Isa, $($arg: $ty),*) $(-> $out)? {
            use $crate::ops::cpu::simd;
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
            fn avx512$(<$t: $bound>)?($($arg: $ty),*) $(-> $out)? {
                // SAFETY: the instruction set is enabled in this function.
                unsafe { $kernel::<simd::Avx512 $(, $t)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2$(<$t: $bound>)?($($arg: $ty),*) $(-> $out)? {
                // SAFETY: the instruction set is enabled in this function.
                unsafe { $kernel::<simd::Avx2 $(, $t)?>($($arg),*) }
            }
            match isa {
                // SAFETY: `Isa` values come from detection on this machine.
                #[cfg(target_arch = "x86_64")]
                simd::Isa::Avx512 | simd::Isa::Avx512Vnni | simd::Isa::Amx => unsafe {
                    avx512$(::<$t>)?($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                simd::Isa::Avx2 | simd::Isa::AvxVnni => unsafe { avx2$(::<$t>)?($($arg),*) },
                // SAFETY: as above; every function on this machine has the instruction set enabled.
                #[cfg(target_arch = "aarch64")]
                simd::Isa::Neon | simd::Isa::NeonDot | simd::Isa::NeonI8mm => unsafe {
                    $kernel::<simd::Neon $(, $t)?>($($arg),*)
                },
                // SAFETY: plain Rust runs everywhere.
                _ => unsafe { $kernel::<simd::Portable $(, $t)?>($($arg),*) },
            }
        }
    };
}
pub(crate) use per_isa;

/// `eˣ` within 2 ulp for finite results; written so that loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Below -87.3 the result is subnormal: 0 is near enough for softmax and silu. NaN stays NaN.
    let bounded = x.clamp(-87.3, 88.7);
    // 1.5 · 2^23: the sum is rounded to an integer, ties to even, which its low bits hold. (A cast
    // would not vectorise.)
    const MAGIC: f32 = 12_582_912.0;
    let shifted = bounded * std::f32::consts::LOG2_E + MAGIC;
    let power = shifted - MAGIC;
    // ln 2 in two parts (Cody and Waite), so that the remainder keeps all its bits.
    let r = power.mul_add_fast(-0.693_359_4, bounded);
    let r = power.mul_add_fast(2.121_944_4e-4, r);
    // Minimax polynomial of Cephes' expf on [-ln 2 / 2, ln 2 / 2].
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add_fast(r, 1.398_2e-3);
    let p = p.mul_add_fast(r, 8.333_452e-3);
    let p = p.mul_add_fast(r, 4.166_579_6e-2);
    let p = p.mul_add_fast(r, 1.666_666_5e-1);
    let p = p.mul_add_fast(r, 0.5);
    let e = p.mul_add_fast(r * r, r) + 1.0;
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { e * scale }
}

trait MulAddFast {
    fn mul_add_fast(self, b: f32, c: f32) -> f32;
}

impl MulAddFast for f32 {
    /// Multiply and add with a rounding between: `f32::mul_add` is a library call without FMA.
    #[inline(always)]
    fn mul_add_fast(self, b: f32, c: f32) -> f32 {
        self * b + c
    }
}

#[cfg(test)]
mod tests {
    use super::{Isa, Simd, exp};

    super::per_isa!(exp_of, exp_of_kernel, (x: &[f32; 16]) -> [f32; 16]);

    /// # Safety
    /// The instruction set of `S` is present.
    #[inline(always)]
    unsafe fn exp_of_kernel<S: Simd>(x: &[f32; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for at in (0..16).step_by(S::LANES) {
            // SAFETY: a vector from `at` on is inside both.
            unsafe {
                S::load(x.as_ptr().add(at))
                    .exp()
                    .store(out.as_mut_ptr().add(at))
            };
        }
        out
    }

    #[test]
    fn the_best_instruction_set_is_used_or_the_one_that_is_asked_for() {
        let available = Isa::available();
        let best = available.last().expect("plain Rust at least").name();
        let wanted = std::env::var("QWEN2_CPU");
        assert_eq!(Isa::selected().name(), wanted.as_deref().unwrap_or(best));
        let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
        let plainest = if cfg!(target_arch = "aarch64") {
            &["portable", "neon"][..]
        } else {
            &["portable"]
        };
        assert_eq!(names[..plainest.len()], *plainest);
    }

    #[test]
    fn exp_is_within_two_ulp_of_the_library() {
        let mut x = -87.0_f32;
        while x < 88.0 {
            let want = f64::from(x).exp() as f32;
            let ulp = |got: f32| (want.to_bits() as i64 - got.to_bits() as i64).abs();
            assert!(ulp(exp(x)) <= 2, "exp({x}): {} ulp", ulp(exp(x)));
            for isa in Isa::available() {
                let got = exp_of(isa, &[x; 16]);
                assert!(got.iter().all(|got| ulp(*got) <= 2), "{isa:?} {x}: {got:?}");
            }
            x += 0.0137;
        }
    }

    #[test]
    fn exp_has_its_limits() {
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        for isa in Isa::available() {
            assert!(exp_of(isa, &[f32::NAN; 16]).iter().all(|x| x.is_nan()));
            for (x, want) in [(f32::NEG_INFINITY, 0.0), (-200.0, 0.0), (0.0, 1.0)] {
                assert_eq!(exp_of(isa, &[x; 16]), [want; 16], "{isa:?}");
            }
        }
    }
}
