//! The highest of a row of logits, those that come next, and the place of the step behind it.

use burn_cubecl::cubecl::{self, prelude::*};

use super::reduce::UNITS;

/// What stands for a row that has no highest logit: it holds NaN or +infinity, or is -infinity throughout.
pub(super) const NONE: u32 = u32::MAX;
/// The keys of the infinities; that of a NaN is above both.
const LEAST: u32 = 0x007f_ffff;
const MOST: u32 = 0xff80_0000;

/// A number as one that is ordered as it is, infinities and zeros as well; WGSL leaves comparisons with
/// what is no number undefined.
#[cube]
pub(super) fn key(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let magnitude = bits & 0x7fff_ffff;
    let is_negative = bits > 0x8000_0000;
    let of_number = select(is_negative, !bits, magnitude | 0x8000_0000);
    select(magnitude > 0x7f80_0000, NONE.runtime(), of_number)
}

/// The number of a key that is one's.
#[cube]
pub(super) fn number(key: u32) -> f32 {
    f32::reinterpret(select(key < 0x8000_0000, !key, key ^ 0x8000_0000))
}

/// Leaves the better of all in the first place: the higher, of equals the one with the lower place.
#[cube]
pub(super) fn reduce(keys: &mut [u32], places: &mut [u32]) {
    let unit = UNIT_POS as usize;
    for step in 0..comptime!(UNITS.ilog2()) {
        let half = UNITS.runtime() >> (step as usize + 1);
        sync_cube();
        if unit < half {
            let other = keys[unit + half];
            let place = places[unit + half];
            if other > keys[unit] || (other == keys[unit] && place < places[unit]) {
                keys[unit] = other;
                places[unit] = place;
            }
        }
    }
    sync_cube();
}

/// Each cube finds the highest of its share of `row` and where it is.
#[cube(launch_unchecked)]
pub(super) fn best_of_shares(row: &[f32], best: &mut [u32], at: &mut [u32], n: u32, share: u32) {
    let unit = UNIT_POS as usize;
    let first = CUBE_POS * share as usize;
    let end = clamp_max(first + share as usize, n as usize);
    let mut highest = 0u32.runtime();
    let mut place = NONE.runtime();
    let mut i = first + unit;
    while i < end {
        let logit = key(row[i]);
        if logit > highest {
            highest = logit;
            place = i as u32;
        }
        i += UNITS;
    }
    let mut keys = Shared::<[u32]>::new_slice(UNITS);
    let mut places = Shared::<[u32]>::new_slice(UNITS);
    keys[unit] = highest;
    places[unit] = place;
    reduce(&mut keys, &mut places);
    if unit == 0 {
        best[CUBE_POS] = keys[0];
        at[CUBE_POS] = places[0];
    }
}

/// The most of the likeliest tokens that the host reads.
pub(super) const MOST_LIKELY: usize = 1024;
/// As many are found at least, where there are as many shares.
const WANTED: usize = 128;

/// The best of up to [`UNITS`] shares: its place goes to `found` and, as the next token, to `token`;
/// `n_past` counts the step. [`NONE`] and token 0 where there is none. `likely` is ready for [`gather`] then:
/// none of them so far, or too many where there is no best.
#[cube(launch_unchecked)]
pub(super) fn best_of_all(
    best: &[u32],
    at: &[u32],
    found: &mut [u32],
    likely: &mut [u32],
    token: &mut [u32],
    n_past: &mut [u32],
    shares: u32,
) {
    let unit = UNIT_POS as usize;
    let inside = unit < shares as usize;
    let index = clamp_max(unit, shares as usize - 1);
    let mut keys = Shared::<[u32]>::new_slice(UNITS);
    let mut places = Shared::<[u32]>::new_slice(UNITS);
    keys[unit] = select(inside, best[index], 0u32.runtime());
    places[unit] = select(inside, at[index], NONE.runtime());
    reduce(&mut keys, &mut places);
    if unit == 0 {
        let is_number = keys[0] > LEAST && keys[0] < MOST;
        found[0] = select(is_number, places[0], NONE.runtime());
        likely[0] = select(is_number, 0u32, comptime!(MOST_LIKELY as u32 + 1).runtime());
        token[0] = select(is_number, places[0], 0u32.runtime());
        n_past[0] = n_past[0] + 1;
    }
}

/// Tokens with their logits, of a row whose shares have the `best` keys, behind their number in `likely`, in any order
/// and as far as there is room: all from the [`WANTED`]th highest of these keys on. As many are found at least, and every
/// other token has a lower logit.
#[cube(launch_unchecked)]
pub(super) fn gather(row: &[f32], best: &[u32], likely: &[Atomic<u32>], n: u32, share: u32) {
    let unit = UNIT_POS as usize;
    let shares = CUBE_COUNT;
    let mut keys = Shared::<[u32]>::new_slice(UNITS);
    let mut least = Shared::<[u32]>::new_slice(1usize);
    let mine = select(
        unit < shares,
        best[clamp_max(unit, shares - 1)],
        0u32.runtime(),
    );
    keys[unit] = mine;
    sync_cube();
    let mut above = 0u32.runtime();
    for i in 0..shares {
        let other = keys[i];
        above += select(
            other > mine || (other == mine && i < unit),
            1u32,
            0u32.runtime(),
        );
    }
    if above as usize + 1 == clamp_max(WANTED.runtime(), shares) && unit < shares {
        least[0] = mine;
    }
    sync_cube();
    let least = least[0];
    let first = CUBE_POS * share as usize;
    let end = clamp_max(first + share as usize, n as usize);
    let mut i = first + unit;
    while i < end {
        let logit = row[i];
        if key(logit) >= least {
            let at = likely[0].fetch_add(1u32) as usize;
            if at < MOST_LIKELY {
                likely[1 + 2 * at].store(i as u32);
                likely[2 + 2 * at].store(u32::reinterpret(logit));
            }
        }
        i += UNITS;
    }
}

/// Sets the token and the place of the next step.
#[cube(launch_unchecked)]
pub(super) fn set(token: &mut [u32], n_past: &mut [u32], next: u32, at: u32) {
    if ABSOLUTE_POS == 0 {
        token[0] = next;
        n_past[0] = at;
    }
}
