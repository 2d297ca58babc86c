//! What stands between the matrices: norm, rotary embedding and the gate, in one pass each.

use super::pool;
use super::simd::{Isa, Simd, exp, per_isa};

/// Elements below which a second thread does not pay for its wake-up.
const WORTH_SHARING: usize = 1 << 15;

/// Calls `body(row, out_row)` for every row of `out`, shared among threads when it pays.
fn by_row(out: &mut [f32], width: usize, body: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let rows = out.len() / width.max(1);
    if out.len() < WORTH_SHARING {
        for (row, out) in out.chunks_exact_mut(width).enumerate() {
            body(row, out);
        }
        return;
    }
    let tasks = (pool::current_threads() * 4).min(rows);
    let per_task = rows.div_ceil(tasks);
    let chunks: Vec<_> = out
        .chunks_mut(per_task * width)
        .map(std::sync::Mutex::new)
        .collect();
    pool::parallel(chunks.len(), &|task| {
        // Each lock is taken once, by its own task.
        let mut chunk = chunks[task]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (row, out) in chunk.chunks_exact_mut(width).enumerate() {
            body(task * per_task + row, out);
        }
    });
}

/// `out = weight · x / √(mean(x²) + eps)` row by row, the mean in f32.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "norm length");
    let width = weight.len();
    by_row(out, width, &|row, out| {
        norm_row(isa, &x[row * width..][..width], weight, eps, out)
    });
}

per_isa!(norm_row, norm_kernel, (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));

/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn norm_kernel<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: the pointers have `x.len()` elements.
    let squares = unsafe { super::matmul::dot::<S, f32>(x.as_ptr(), x.as_ptr(), x.len()) };
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = *x * scale * *weight;
    }
}

/// Rotates `x` `[n, heads, 2 · half]` in place by the angles of `cos`, `sin` `[n, half]`.
pub(crate) fn rope(isa: Isa, x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], half: usize) {
    assert_eq!(cos.len(), sin.len(), "table length");
    assert_eq!(x.len(), cos.len() * heads * 2, "table length");
    by_row(x, heads * 2 * half, &|row, x| {
        rotate(
            isa,
            x,
            &cos[row * half..][..half],
            &sin[row * half..][..half],
        );
    });
}

per_isa!(rotate, rotate_kernel, (x: &mut [f32], cos: &[f32], sin: &[f32]));

/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn rotate_kernel<S: Simd>(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(2 * cos.len()) {
        let (a, b) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * *cos - *b * *sin, *b * *cos + *a * *sin);
        }
    }
}

/// `gate = gate · sigmoid(gate) · up` in place.
pub(crate) fn swiglu(isa: Isa, gate: &mut [f32], up: &[f32]) {
    const WIDTH: usize = 256;
    assert_eq!(gate.len(), up.len(), "gate length");
    let whole = gate.len() / WIDTH * WIDTH;
    let (body, rest) = gate.split_at_mut(whole);
    by_row(body, WIDTH, &|row, gate| {
        silu_mul(isa, gate, &up[row * WIDTH..][..WIDTH])
    });
    silu_mul(isa, rest, &up[whole..]);
}

per_isa!(silu_mul, silu_mul_kernel, (gate: &mut [f32], up: &[f32]));

/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn silu_mul_kernel<S: Simd>(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * *up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(len: usize, f: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * f).sin() * 3.0).collect()
    }

    #[test]
    fn norm_matches_the_definition() {
        for (rows, width) in [(1, 7), (3, 896), (70, 513)] {
            let (x, weight) = (wave(rows * width, 0.7), wave(width, 0.3));
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; x.len()];
                rms_norm(isa, &x, &weight, 1e-6, &mut out);
                for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
                    for ((x, out), weight) in x.iter().zip(out).zip(&weight) {
                        let want = f64::from(*weight) * f64::from(*x) / (mean + 1e-6).sqrt();
                        assert!((f64::from(*out) - want).abs() < 2e-5, "{isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn swiglu_matches_the_definition() {
        for len in [1, 255, 4864, 70_001] {
            let (gate, up) = (wave(len, 0.7), wave(len, 0.3));
            for isa in Isa::available() {
                let mut out = gate.clone();
                swiglu(isa, &mut out, &up);
                for ((gate, up), out) in gate.iter().zip(&up).zip(&out) {
                    let want = f64::from(*gate) / (1.0 + f64::from(-*gate).exp()) * f64::from(*up);
                    assert!((f64::from(*out) - want).abs() < 1e-5, "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn silu_of_huge_values_is_defined() {
        for isa in Isa::available() {
            let mut gate = [1e30, -1e30, f32::INFINITY, f32::NAN, -0.0];
            swiglu(isa, &mut gate, &[1.0; 5]);
            assert_eq!(gate[0], 1e30);
            assert!(gate[1] == 0.0 || gate[1].abs() < 1e-3);
            assert_eq!(gate[2], f32::INFINITY);
            assert!(gate[3].is_nan());
            assert_eq!(gate[4], 0.0);
        }
    }

    #[test]
    fn rotation_pairs_the_halves_and_keeps_the_length() {
        let (n, heads, half) = (5, 3, 4);
        let angles = wave(n * half, 0.9);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let x = wave(n * heads * 2 * half, 0.4);
        for isa in Isa::available() {
            let mut out = x.clone();
            rope(isa, &mut out, heads, &cos, &sin, half);
            for (row, (x, out)) in x.chunks(2 * half).zip(out.chunks(2 * half)).enumerate() {
                for k in 0..half {
                    let (c, s) = (cos[row / heads * half + k], sin[row / heads * half + k]);
                    assert!((out[k] - (x[k] * c - x[half + k] * s)).abs() < 1e-6);
                    assert!((out[half + k] - (x[half + k] * c + x[k] * s)).abs() < 1e-6);
                }
            }
        }
    }
}
