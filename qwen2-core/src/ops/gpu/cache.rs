//! Rotary embedding of queries and keys, and keys and values into the cache.

use burn_cubecl::cubecl::{self, prelude::*};

/// A unit turns two elements of a head of a query or key, or copies two of a value. `qkv`
/// `[n, heads + 2 · kv_heads, 2 · half]`; `q` `[n, heads, 2 · half]`; the caches
/// `[kv_heads, capacity, 2 · half]`; the angles are those of the rows.
#[cube(launch_unchecked)]
pub(super) fn rope_append<F: Float>(
    qkv: &[f32],
    cos: &[f32],
    sin: &[f32],
    q: &mut [f32],
    keys: &mut [F],
    values: &mut [F],
    heads: u32,
    kv_heads: u32,
    half: u32,
    capacity: u32,
    start: u32,
    total: u32,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < total as usize {
        let heads = heads as usize;
        let kv_heads = kv_heads as usize;
        let half = half as usize;
        let i = ABSOLUTE_POS % half;
        let all = heads + 2 * kv_heads;
        let head = ABSOLUTE_POS / half % all;
        let t = ABSOLUTE_POS / half / all;
        let start = start as usize;
        let from = (t * all + head) * 2 * half + i;
        let a = qkv[from];
        let b = qkv[from + half];
        if head < heads + kv_heads {
            let c = cos[t * half + i];
            let s = sin[t * half + i];
            let first = a * c - b * s;
            let second = b * c + a * s;
            if head < heads {
                let to = (t * heads + head) * 2 * half + i;
                q[to] = first;
                q[to + half] = second;
            } else {
                let place = (head - heads) * capacity as usize + start + t;
                keys[place * 2 * half + i] = F::cast_from(first);
                keys[place * 2 * half + i + half] = F::cast_from(second);
            }
        } else {
            let place = (head - heads - kv_heads) * capacity as usize + start + t;
            values[place * 2 * half + i] = F::cast_from(a);
            values[place * 2 * half + i + half] = F::cast_from(b);
        }
    }
}
