//! Matrix products of AMX: whether this process may use them, and tiles of bf16.
//!
//! The intrinsics are not stable yet, so the instructions are written out. A tile register holds 16 rows
//! of 64 bytes; no compiled code uses them but what is here, and each use ends with `tilerelease`.
#![cfg(target_arch = "x86_64")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Tokens and rows of a tile.
const TILE: usize = 16;
/// Rows of a panel of weights: two tiles.
const ROWS: usize = 2 * TILE;

/// Whether the machine has AMX with bf16, and the system lets this process use it.
pub(super) fn is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        let wanted = BF16 | TILES;
        let highest = __cpuid_count(0, 0).eax;
        highest >= 7 && __cpuid_count(7, 0).edx & wanted == wanted && is_permitted()
    })
}

/// Asks Linux for the tiles, whose eight kilobytes it keeps only for processes that did. It refuses where
/// a thread's signal stack is too small for them.
#[cfg(all(target_os = "linux", not(miri)))]
fn is_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: a system call that touches no memory of ours; the kernel changes rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn is_permitted() -> bool {
    false
}

/// How many rows each tile register has; rows are 64 bytes long.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Sums in tiles 0 to 3, those of the second tokens in the last two; tokens in tiles 4 and 5, weights in
    /// tiles 6 and 7.
    fn new(first: usize, second: usize) -> Self {
        let mut rows = [0; 16];
        let (first, second) = (first as u8, second.max(1) as u8);
        rows[..8].copy_from_slice(&[first, first, second, second, first, second, 16, 16]);
        let mut row_bytes = [0; 16];
        row_bytes[..8].fill(64);
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes,
            rows,
        }
    }

    /// # Safety
    /// AMX is present and permitted.
    unsafe fn load(&self) {
        // SAFETY: the configuration is valid: palette 1, rows of 1 to 16 times 64 bytes.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly, preserves_flags));
        }
    }
}

/// bf16 activations times interleaved bf16 weights.
pub(super) struct Bf16<'a> {
    /// `[blocks][n][16]`, pairs of columns.
    pub(super) x: &'a [u32],
    pub(super) n: usize,
    /// Of 32 columns.
    pub(super) blocks: usize,
    /// `[panels][pairs of columns][32 rows]`, at least `blocks` of 16 pairs.
    pub(super) weights: &'a [u32],
    pub(super) panels: usize,
}

/// The products into `sums`, `[n, panels · 32]`, or added to them; `meanwhile` is called with a panel and what
/// is done of it in each step: how many tokens, how many more now, of how many.
///
/// # Panics
/// If a length does not fit, or there is no AMX.
pub(super) fn multiply_bf16(
    args: &Bf16<'_>,
    add: bool,
    sums: &mut [f32],
    meanwhile: &dyn Fn(usize, (usize, usize, usize)),
) {
    let Bf16 {
        x,
        n,
        blocks,
        weights,
        panels,
    } = *args;
    assert!(is_present(), "AMX");
    assert!(blocks * n * TILE <= x.len(), "activations");
    let panel = weights.len() / panels;
    assert!(blocks * TILE * ROWS <= panel, "weights");
    let stride = panels * ROWS;
    assert_eq!(n * stride, sums.len(), "sums");
    // The weights of a panel stay in the first-level cache, the activations come from the second.
    let mut configured = (0, 0);
    for (p, t) in (0..panels).flat_map(|p| (0..n).step_by(2 * TILE).map(move |t| (p, t))) {
        let tokens = ((n - t).min(TILE), (n - t).saturating_sub(TILE).min(TILE));
        let is_second = tokens.1 > 0;
        meanwhile(p, (t, tokens.0 + tokens.1, n));
        // SAFETY: AMX is there. The tokens are inside `x` in each block and inside `sums`, whose panels of
        // rows are `stride` apart, and the panel of weights has the blocks, as was checked.
        unsafe {
            if tokens != configured {
                Configuration::new(tokens.0, tokens.1).load();
                configured = tokens;
            }
            let x = x.as_ptr().add(t * TILE);
            let w = weights.as_ptr().add(p * panel);
            let sums = sums.as_mut_ptr().add(t * stride + p * ROWS);
            begin(add, is_second, sums, stride);
            if is_second {
                two(x, n, blocks, w);
            } else {
                one(x, n, blocks, w);
            }
            end(is_second, sums, stride);
        }
    }
    // SAFETY: AMX is there.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
}

/// The sums of up to 16 tokens and a panel into tiles 0 and 1, those of the `second` ones into 2 and 3: zeros,
/// or what is there, to be added to.
///
/// # Safety
/// AMX is configured for as many tokens; `sums` holds their rows of 32, `stride` apart.
#[inline]
unsafe fn begin(add: bool, second: bool, sums: *const f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        if !add {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags),
            );
            return;
        }
        asm!(
            "tileloadd tmm0, [{c} + {cs}*1]",
            "tileloadd tmm1, [{c} + {cs}*1 + 64]",
            c = in(reg) sums,
            cs = in(reg) stride * 4,
            options(nostack, readonly, preserves_flags),
        );
        if second {
            asm!(
                "tileloadd tmm2, [{c} + {cs}*1]",
                "tileloadd tmm3, [{c} + {cs}*1 + 64]",
                c = in(reg) sums.add(TILE * stride),
                cs = in(reg) stride * 4,
                options(nostack, readonly, preserves_flags),
            );
        }
    }
}

/// Stores what [`begin`] began.
///
/// # Safety
/// As [`begin`].
#[inline]
unsafe fn end(second: bool, sums: *mut f32, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilestored [{c} + {cs}*1], tmm0",
            "tilestored [{c} + {cs}*1 + 64], tmm1",
            c = in(reg) sums,
            cs = in(reg) stride * 4,
            options(nostack, preserves_flags),
        );
        if second {
            asm!(
                "tilestored [{c} + {cs}*1], tmm2",
                "tilestored [{c} + {cs}*1 + 64], tmm3",
                c = in(reg) sums.add(TILE * stride),
                cs = in(reg) stride * 4,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// The loop of [`one`], and what more it does for second tokens.
macro_rules! add_products {
    ($x:ident, $n:ident, $blocks:ident, $w:ident $(, $second:literal)*) => {
        asm!(
            "2:",
            "tileloadd tmm6, [{w} + {ws}*1]",
            "tileloadd tmm4, [{x} + {xs}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w} + {ws}*1 + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            $($second,)*
            "add {x}, {xn}",
            "add {w}, 2048",
            "dec {blocks}",
            "jnz 2b",
            x = inout(reg) $x => _,
            xs = in(reg) 64_usize,
            xn = in(reg) $n * 64,
            w = inout(reg) $w => _,
            ws = in(reg) 128_usize,
            blocks = inout(reg) $blocks => _,
            options(nostack, readonly),
        )
    };
}

/// Adds the products of up to 16 tokens with a panel to the tiles.
///
/// # Safety
/// AMX is configured for as many tokens; `x` and `w` hold what [`multiply_bf16`] says of them.
#[inline]
unsafe fn one(x: *const u32, n: usize, blocks: usize, w: *const u32) {
    // SAFETY: the caller's promise; the pointers stay inside, the last step leads one past.
    unsafe { add_products!(x, n, blocks, w) };
}

/// As [`one`], of more than 16 tokens, up to 32.
///
/// # Safety
/// As [`one`].
#[inline]
unsafe fn two(x: *const u32, n: usize, blocks: usize, w: *const u32) {
    // SAFETY: as in `one`.
    unsafe {
        add_products!(
            x,
            n,
            blocks,
            w,
            "tileloadd tmm5, [{x} + {xs}*1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7"
        );
    }
}
