//! What stands between the matrices: the norm, and the rotary embedding on the way to the cache.

use std::ops::Range;

use super::layout::Writer;
use super::pool;
use super::simd::{Isa, Simd, per_isa};

/// Elements below which a second thread does not pay for its wake-up.
const WORTH_SHARING: usize = 1 << 15;

/// Calls `body(row, out_row)` for every row of `out`, shared among threads when it pays.
pub(crate) fn by_row(out: &mut [f32], width: usize, body: &(dyn Fn(usize, &mut [f32]) + Sync)) {
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

/// Cosines and sines, `[n, half]` each.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    pub(crate) half: usize,
}

impl<'a> Tables<'a> {
    /// Those of one position.
    fn row(self, i: usize) -> (&'a [f32], &'a [f32]) {
        let row = i * self.half..(i + 1) * self.half;
        (&self.cos[row.clone()], &self.sin[row])
    }

    /// Those of some positions.
    pub(crate) fn rows(self, rows: Range<usize>) -> Self {
        let part = rows.start * self.half..rows.end * self.half;
        Self {
            cos: &self.cos[part.clone()],
            sin: &self.sin[part],
            half: self.half,
        }
    }
}

/// Rows of queries, keys and values side by side that go to a cache.
#[derive(Clone, Copy)]
pub(crate) struct New<'a> {
    /// `[n, width]`.
    pub(crate) qkv: &'a [f32],
    pub(crate) width: usize,
    /// `n` rows, of the keys.
    pub(crate) angles: Tables<'a>,
    /// The position of the first.
    pub(crate) start: usize,
}

/// Rotates the queries of `qkv` `[n, width]`, its first columns, into `q`
/// `[rotations, n, heads · 2 · half]`: once by each of the `rotations · n` rows of the tables.
pub(crate) fn rotate_queries(
    isa: Isa,
    qkv: &[f32],
    width: usize,
    tables: Tables<'_>,
    q: &mut [f32],
) {
    let n = qkv.len() / width;
    let queries = q.len() / (tables.cos.len() / tables.half);
    by_row(q, queries, &|row, q| {
        q.copy_from_slice(&qkv[row % n * width..][..queries]);
        let (cos, sin) = tables.row(row);
        rotate(isa, q, cos, sin);
    });
}

/// Rotates the keys of `new`, and writes them and the values, its last columns, to the caches of the
/// heads.
pub(crate) fn append(isa: Isa, new: New<'_>, heads: Vec<impl Writer>) {
    let New {
        qkv,
        width,
        angles: tables,
        start,
    } = new;
    let (head_dim, kv_heads) = (2 * tables.half, heads.len());
    let first = width - 2 * kv_heads * head_dim;
    // A task for each head: the cache lies head by head.
    let write = |head: usize, cache: &mut dyn Writer| {
        let mut rotated = vec![0.0; head_dim];
        for (i, new) in qkv.chunks_exact(width).enumerate() {
            rotated.copy_from_slice(&new[first + head * head_dim..][..head_dim]);
            let (cos, sin) = tables.row(i);
            rotate(isa, &mut rotated, cos, sin);
            cache.key(start + i, &rotated);
            let value = &new[first + (kv_heads + head) * head_dim..][..head_dim];
            cache.value(start + i, value);
        }
    };
    if qkv.len() < WORTH_SHARING {
        for (head, mut cache) in heads.into_iter().enumerate() {
            write(head, &mut cache);
        }
        return;
    }
    let heads: Vec<_> = heads.into_iter().map(std::sync::Mutex::new).collect();
    pool::parallel(kv_heads, &|head| {
        // Each lock is taken once, by its own task.
        let mut cache = heads[head]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        write(head, &mut *cache);
    });
}

per_isa!(rotate, rotate_kernel, (x: &mut [f32], cos: &[f32], sin: &[f32]));

/// Every head of `x` by the same angles.
///
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

#[cfg(test)]
mod tests {
    use super::super::layout::FloatsWriter;
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
    fn rotation_pairs_the_halves_and_keeps_the_length() {
        let (n, heads, half) = (5, 3, 4);
        let angles = wave(n * half, 0.9);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let x = wave(n * heads * 2 * half, 0.4);
        for isa in Isa::available() {
            let tables = Tables {
                cos: &cos,
                sin: &sin,
                half,
            };
            let mut out = vec![f32::NAN; x.len()];
            rotate_queries(isa, &x, heads * 2 * half, tables, &mut out);
            for (row, (x, out)) in x.chunks(2 * half).zip(out.chunks(2 * half)).enumerate() {
                for k in 0..half {
                    let (c, s) = (cos[row / heads * half + k], sin[row / heads * half + k]);
                    assert!((out[k] - (x[k] * c - x[half + k] * s)).abs() < 1e-6);
                    assert!((out[half + k] - (x[half + k] * c + x[k] * s)).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn keys_are_rotated_and_values_are_not() {
        let (n, heads, kv_heads, half, capacity, start) = (3, 2, 2, 2, 32, 15);
        let (d, width) = (2 * half, (heads + 2 * kv_heads) * 2 * half);
        let qkv = wave(n * width, 0.4);
        let angles = wave(n * half, 0.9);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let tables = Tables {
            cos: &cos,
            sin: &sin,
            half,
        };
        for isa in Isa::available() {
            let mut keys = vec![f32::NAN; kv_heads * capacity * d];
            let mut values = keys.clone();
            let caches = keys.chunks_mut(capacity * d);
            let caches = caches.zip(values.chunks_mut(capacity * d));
            let caches = caches.map(|(keys, values)| FloatsWriter {
                head_dim: d,
                keys,
                values,
            });
            let new = New {
                qkv: &qkv,
                width,
                angles: tables,
                start,
            };
            append(isa, new, caches.collect());
            for (i, head, k) in (0..n * kv_heads * d).map(|x| (x / d / 2, x / d % 2, x % d)) {
                let at = i * width + (heads + head) * d;
                let (a, b) = (qkv[at + k % half], qkv[at + half + k % half]);
                let (c, s) = (cos[i * half + k % half], sin[i * half + k % half]);
                let want = if k < half {
                    a * c - b * s
                } else {
                    b * c + a * s
                };
                let position = start + i;
                let block = (head * capacity + position / 16 * 16) * d;
                assert!(
                    (keys[block + k * 16 + position % 16] - want).abs() < 1e-6,
                    "{isa:?}"
                );
                let value = values[(head * capacity + position) * d + k];
                assert_eq!(value, qkv[at + kv_heads * d + k]);
            }
            let written = |cache: &[f32]| cache.iter().filter(|x| !x.is_nan()).count();
            assert_eq!(
                (written(&keys), written(&values)),
                (n * kv_heads * d, n * kv_heads * d)
            );
        }
    }
}
