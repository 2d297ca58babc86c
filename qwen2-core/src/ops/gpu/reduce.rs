//! Sums over the units of a cube, by the hardware's planes where they are of 32 units, else in shared memory.

use burn_cubecl::cubecl::{self, prelude::*};

/// Units of a cube of every kernel here.
pub(super) const UNITS: usize = 256;
/// Values that are summed between the same barriers.
const AT_ONCE: usize = 4;
/// Units of a plane, where kernels use planes.
const PLANE: usize = 32;

/// Whether all planes of the device are of the size that the kernels are written for.
pub(super) fn has_planes(client: &cubecl::client::Client) -> bool {
    let properties = client.properties();
    let hardware = &properties.hardware;
    let size = PLANE as u32;
    hardware.plane_size_min == size && hardware.plane_size_max == size
}

/// The sum over each group of `group` units, for all of its units; `shared` has [`UNITS`] elements.
#[cube]
pub(super) fn group_sum(
    value: f32,
    shared: &mut [f32],
    #[comptime] group: usize,
    #[comptime] planes: bool,
) -> f32 {
    let unit = UNIT_POS as usize;
    if comptime!(planes && group >= PLANE) {
        let sum = plane_sum(value);
        if comptime!(group == PLANE) {
            sum
        } else {
            if unit % PLANE == 0 {
                shared[unit / PLANE] = sum;
            }
            sync_cube();
            let parts = comptime!(group / PLANE);
            let first = unit / group * parts;
            let mut total = 0.0f32;
            #[unroll]
            for part in 0..parts {
                total += shared[first + part];
            }
            sync_cube();
            total
        }
    } else {
        let mut sums = Array::<f32>::new(1usize);
        sums[0] = value;
        shared_sums(&mut sums, shared, 0usize, 1usize, group);
        sums[0]
    }
}

/// [`group_sum`] of each of the `count` values, in place; `shared` has [`sums_room`] elements.
#[cube]
pub(super) fn group_sums(
    values: &mut Array<f32>,
    shared: &mut [f32],
    #[comptime] count: usize,
    #[comptime] group: usize,
    #[comptime] planes: bool,
) {
    if comptime!(planes && group >= PLANE) {
        #[unroll]
        for i in 0..count {
            values[i] = group_sum(values[i], shared, group, planes);
        }
    } else {
        #[unroll]
        for i in 0..comptime!(count.div_ceil(AT_ONCE)) {
            let at = comptime!(i * AT_ONCE);
            shared_sums(
                values,
                shared,
                at,
                comptime!((count - at).min(AT_ONCE)),
                group,
            );
        }
    }
}

/// What [`group_sums`] needs of shared memory.
pub(super) fn sums_room(planes: bool) -> usize {
    if planes { UNITS } else { UNITS * AT_ONCE }
}

/// Sums of some of the values in shared memory, halving the units. A loop, and several values between two barriers:
/// a compiler that makes coroutines of barriers, as Mesa's for processors does, takes long for many of them.
#[cube]
fn shared_sums(
    values: &mut Array<f32>,
    shared: &mut [f32],
    #[comptime] at: usize,
    #[comptime] count: usize,
    #[comptime] group: usize,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % group;
    #[unroll]
    for i in 0..count {
        shared[i * UNITS + unit] = values[comptime!(at + i)];
    }
    sync_cube();
    for step in 0..comptime!(group.ilog2()) {
        let half = group.runtime() >> (step as usize + 1);
        if lane < half {
            #[unroll]
            for i in 0..count {
                let to = i * UNITS + unit;
                shared[to] = shared[to] + shared[to + half];
            }
        }
        sync_cube();
    }
    #[unroll]
    for i in 0..count {
        values[comptime!(at + i)] = shared[i * UNITS + unit - lane];
    }
    sync_cube();
}

/// The greatest over each group of [`PLANE`] units, for all of its units.
#[cube]
pub(super) fn plane_wide_max(value: f32, shared: &mut [f32], #[comptime] planes: bool) -> f32 {
    if comptime!(planes) {
        plane_max(value)
    } else {
        let unit = UNIT_POS as usize;
        shared[unit] = value;
        sync_cube();
        let lane = unit % PLANE;
        for step in 0..comptime!(PLANE.ilog2()) {
            let half = PLANE.runtime() >> (step as usize + 1);
            if lane < half {
                shared[unit] = f32::max(shared[unit], shared[unit + half]);
            }
            sync_cube();
        }
        let most = shared[unit - lane];
        sync_cube();
        most
    }
}
