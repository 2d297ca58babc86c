//! Sums over the units of a cube, by the hardware's planes where they are of 32 units, else in shared memory.

use burn_cubecl::cubecl::{self, prelude::*};

/// Units of a cube of every kernel here.
pub(super) const UNITS: usize = 256;
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
        shared[unit] = value;
        sync_cube();
        let lane = unit % group;
        #[unroll]
        for step in 0..comptime!(group.ilog2()) {
            let half = comptime!(group >> (step + 1));
            if lane < half {
                shared[unit] = shared[unit] + shared[unit + half];
            }
            sync_cube();
        }
        let total = shared[unit - lane];
        sync_cube();
        total
    }
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
        #[unroll]
        for step in 0..comptime!(PLANE.ilog2()) {
            let half = comptime!(PLANE >> (step + 1));
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
