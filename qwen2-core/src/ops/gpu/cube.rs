//! Tensors as buffers of kernels, and the kernels of norm, rope, cache and attention on tensors.

use burn::backend::{BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind};
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::zspace::metadata::Metadata;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

use super::attention::{self, AttentionPlan, MAX_SPLITS, SpanLaunch, TILE};
use super::reduce::{UNITS, has_planes};
use super::{cache, elementwise, norm, product, prompt};
use crate::ops::{Angles, Place, RmsNorm};

/// Whether the tensor lives where these kernels run.
pub(crate) fn takes<const D: usize>(x: &Tensor<D>) -> bool {
    is_here(x.clone().into_dispatch())
}

pub(super) fn is_here(tensor: DispatchTensor) -> bool {
    matches!(tensor.kind, DispatchTensorKind::Cube(_))
}

/// The tensor's buffer, its elements in order.
pub(super) fn cube(x: impl IntoDispatch) -> CubeTensor {
    into_contiguous(raw(x))
}

/// The tensor's buffer, its elements wherever its strides say.
pub(super) fn raw(x: impl IntoDispatch) -> CubeTensor {
    let DispatchTensorKind::Cube(tensor) = x.into_dispatch_tensor().kind else {
        unreachable!("operations ask `takes` first");
    };
    match tensor {
        BackendTensor::Float(tensor) | BackendTensor::Int(tensor) => tensor,
        _ => unreachable!("floats and integers are all there is"),
    }
}

/// Float and integer tensors.
pub(super) trait IntoDispatch {
    fn into_dispatch_tensor(self) -> DispatchTensor;
}

impl<const D: usize> IntoDispatch for Tensor<D> {
    fn into_dispatch_tensor(self) -> DispatchTensor {
        self.into_dispatch()
    }
}

impl<const D: usize> IntoDispatch for Tensor<D, burn::tensor::Int> {
    fn into_dispatch_tensor(self) -> DispatchTensor {
        self.into_dispatch()
    }
}

/// An integer tensor of the buffer.
pub(super) fn integers(cube: CubeTensor) -> Tensor<1, burn::tensor::Int> {
    Tensor::from_dispatch(DispatchTensor {
        kind: DispatchTensorKind::Cube(BackendTensor::Int(cube)),
        autodiff: DispatchAutodiffContext::Disabled,
    })
}

/// A float tensor of the buffer.
pub(super) fn tensor<const D: usize>(cube: CubeTensor) -> Tensor<D> {
    Tensor::from_dispatch(DispatchTensor {
        kind: DispatchTensorKind::Cube(BackendTensor::Float(cube)),
        autodiff: DispatchAutodiffContext::Disabled,
    })
}

/// A buffer beside `like`, not yet written.
pub(super) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        shape.into(),
        dtype,
    )
}

/// The tensor in a buffer that nobody else reads.
pub(super) fn own(tensor: CubeTensor) -> CubeTensor {
    match tensor.can_mut() {
        true => tensor,
        false => tensor.copy(),
    }
}

/// The element as cubecl names it.
pub(super) fn elem(dtype: DType) -> burn_cubecl::cubecl::ir::ElemType {
    burn::backend::cubecl::dtype_to_storage_type(dtype)
}

/// The norm of each row, in numbers of `dtype`.
pub(super) fn rms_norm(x: &Tensor<2>, norm: &RmsNorm, dtype: DType) -> Tensor<2> {
    let [n, cols] = x.dims();
    let x = cube(x.clone());
    let weight = cube(norm.weight.clone());
    let out = empty(&x, [n, cols], dtype);
    let client = x.client.clone();
    // SAFETY: a cube writes one row of `out`, and reads the same of `x` and all of the weight.
    unsafe {
        norm::rms_norm::launch_unchecked(
            &client,
            CubeCount::Static(n as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            cols as u32,
            norm.eps as f32,
            has_planes(&client),
            elem(dtype),
        );
    }
    tensor(out)
}

/// `silu(gate) · up`, number by number, in `dtype`.
pub(super) fn silu_times(gate: Tensor<2>, up: Tensor<2>, dtype: DType) -> Tensor<2> {
    let [n, width] = gate.dims();
    gated(cube(gate), cube(up), [n, width], [width, 0], dtype)
}

/// As [`silu_times`] of the left and the right half of each row.
pub(super) fn silu_halves(both: Tensor<2>, dtype: DType) -> Tensor<2> {
    let [n, width] = both.dims();
    let both = cube(both);
    gated(
        both.clone(),
        both,
        [n, width / 2],
        [width, width / 2],
        dtype,
    )
}

fn gated(
    gate: CubeTensor,
    up: CubeTensor,
    [n, width]: [usize; 2],
    [stride, first_up]: [usize; 2],
    dtype: DType,
) -> Tensor<2> {
    let out = empty(&gate, [n, width], dtype);
    let client = gate.client.clone();
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: a unit below `n · width` writes its number, and reads one of each matrix, whose `n` rows are
    // `stride` long, with `first_up + width` of them at most.
    unsafe {
        elementwise::silu_times::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, n * width, dim),
            dim,
            gate.into_buffer_arg(),
            up.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            width as u32,
            stride as u32,
            first_up as u32,
            (n * width) as u32,
            elem(dtype),
        );
    }
    tensor(out)
}

/// The same numbers in `dtype`, rows without gaps, which burn's own may have.
pub(super) fn cast(x: &Tensor<2>, dtype: DType) -> Tensor<2> {
    let dims = x.dims();
    if x.dtype() == dtype {
        return x.clone();
    }
    if x.dtype() != DType::F32 {
        return x.clone().cast(dtype);
    }
    let x = cube(x.clone());
    let out = empty(&x, dims, dtype);
    let total = dims[0] * dims[1];
    let client = x.client.clone();
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: a unit below `total` reads and writes the number of its place, which both have.
    unsafe {
        elementwise::convert::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, total, dim),
            dim,
            x.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            total as u32,
            elem(dtype),
        );
    }
    tensor(out)
}

/// Tensors that lie behind each other in one buffer, as one.
pub(super) fn behind(parts: &[CubeTensor]) -> Option<CubeTensor> {
    let (first, last) = (parts.first()?, parts.last()?);
    let start = |part: &CubeTensor| part.handle.offset_start.unwrap_or(0);
    let (mut end, mut rows) = (start(first), 0);
    let shape = |part: &CubeTensor| part.meta.shape().to_vec();
    for part in parts {
        let goes_on = part.handle.memory.descriptor() == first.handle.memory.descriptor()
            && start(part) == end
            && part.dtype == first.dtype
            && shape(part)[1..] == shape(first)[1..]
            && part.is_contiguous();
        if !goes_on {
            return None;
        }
        rows += shape(part)[0];
        end += (shape(part).iter().product::<usize>() * part.dtype.size()) as u64;
    }
    let mut dims = shape(first);
    dims[0] = rows;
    let mut whole = first.clone();
    whole.handle.offset_end = last.handle.offset_end;
    let strides = first.meta.strides().clone();
    whole.meta = Box::new(Metadata::new(Shape::from(dims), strides));
    Some(whole)
}

/// Rotated queries `[n, heads, head_dim]`, and the caches with the new keys and values from `start` on.
pub(super) fn rope_append(
    qkv: Tensor<2>,
    angles: &Angles,
    keys: Tensor<3>,
    values: Tensor<3>,
    start: usize,
) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    let [kv_heads, capacity, head_dim] = keys.dims();
    let [n, width] = qkv.dims();
    let heads = width / head_dim - 2 * kv_heads;
    let qkv = cube(qkv);
    let (cos, sin) = (cube(angles.cos.clone()), cube(angles.sin.clone()));
    let (keys, values) = (own(cube(keys)), own(cube(values)));
    let q = empty(&qkv, [n, heads, head_dim], DType::F32);
    let total = n * (heads + 2 * kv_heads) * head_dim / 2;
    let client = qkv.client.clone();
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: a unit below `total` has two elements of a head of `qkv` to itself, and writes them to `q`
    // or to position `start + t` of a cache; the caller made room for `n` positions from `start` on.
    unsafe {
        cache::rope_append::launch_unchecked(
            &client,
            calculate_cube_count_elemwise(&client, total, dim),
            dim,
            qkv.clone().into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            q.clone().into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            heads as u32,
            kv_heads as u32,
            head_dim as u32 / 2,
            capacity as u32,
            start as u32,
            total as u32,
            elem(keys.dtype),
        );
    }
    (tensor(q), tensor(keys), tensor(values))
}

/// Cubes that fill a large device.
const MANY_CUBES: usize = 512;

/// `q` `[n, heads, head_dim]`, which goes on behind `n_past`, over the positions up to each that `window` leaves;
/// the result is `[n, heads · head_dim]`.
pub(super) fn attend(
    q: Tensor<3>,
    keys: &Tensor<3>,
    values: &Tensor<3>,
    n_past: usize,
    window: Option<usize>,
) -> Tensor<2> {
    let [n, heads, head_dim] = q.dims();
    let q = cube(q);
    let (keys, values) = (cube(keys.clone()), cube(values.clone()));
    if n > product::FEW && prompt::takes(&q.client, elem(keys.dtype), head_dim) {
        return attend_prompt(q, &keys, values, n_past, window);
    }
    let angles = [q.clone(), q.clone(), q.clone()]; // not read
    split([n, heads], q, angles, [keys, values], Some(n_past), window)
}

/// The same of one token, behind what is on the device: `qkv` `[1, (heads + 2 · kv_heads) · head_dim]`. Its key and
/// value are written where they are; the caller sees to it that nobody else holds them.
pub(super) fn attend_placed(
    qkv: Tensor<2>,
    keys: &Tensor<3>,
    values: &Tensor<3>,
    place: &Place,
    window: Option<usize>,
) -> Tensor<2> {
    let [kv_heads, _, head_dim] = keys.dims();
    let heads = qkv.dims()[1] / head_dim - 2 * kv_heads;
    let (keys, values) = (cube(keys.clone()), cube(values.clone()));
    let [cos, sin] = [&place.angles.cos, &place.angles.sin].map(|table| cube(table.clone()));
    let angles = [cos, sin, cube(place.n_past.clone())];
    split([1, heads], cube(qkv), angles, [keys, values], None, window)
}

/// By the kernels that split what is looked at; without `n_past` that is on the device, the last of `place`.
fn split(
    [n, heads]: [usize; 2],
    q: CubeTensor,
    place: [CubeTensor; 3],
    [keys, values]: [CubeTensor; 2],
    n_past: Option<usize>,
    window: Option<usize>,
) -> Tensor<2> {
    let [kv_heads, capacity, head_dim] = shape(&keys);
    let client = q.client.clone();
    // Placed, as many as there can ever be.
    let end = n_past.map_or(capacity, |n_past| n_past + n);
    let seen = end.min(window.unwrap_or(usize::MAX));
    let splits = (MANY_CUBES / (n * kv_heads)).clamp(1, seen.div_ceil(TILE).min(MAX_SPLITS));
    let length = seen.div_ceil(splits).next_multiple_of(TILE);
    let splits = seen.div_ceil(length);
    let plan = AttentionPlan {
        group: heads / kv_heads,
        head_dim,
        split: splits > 1,
        placed: n_past.is_none(),
        planes: has_planes(&client),
    };
    let out = empty(&q, [n, heads * head_dim], DType::F32);
    let (parts, stats) = match splits {
        1 => (out.clone(), empty(&q, [1], DType::F32)),
        _ => (
            empty(&q, [n * heads * splits, head_dim], DType::F32),
            empty(&q, [n * heads * splits, 2], DType::F32),
        ),
    };
    let [cos, sin, place] = place;
    // SAFETY: cube (split, head, query) writes the `group` heads of its query at its split, which `parts`
    // and `stats` have room for; it reads positions below `n_past + n`, which the caches hold. Placed, one cube of a
    // key head writes position `n_past`, which no other unit reads, and the angles have a row for each position.
    unsafe {
        attention::attend::launch_unchecked(
            &client,
            CubeCount::Static(splits as u32, kv_heads as u32, n as u32),
            CubeDim::new_1d(UNITS as u32),
            q.into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            values.into_buffer_arg(),
            place.into_buffer_arg(),
            parts.clone().into_buffer_arg(),
            stats.clone().into_buffer_arg(),
            SpanLaunch::new(
                n_past.unwrap_or(0) as u32,
                window.unwrap_or(u32::MAX as usize) as u32,
                capacity as u32,
                length as u32,
                1.0 / (head_dim as f32).sqrt(),
            ),
            plan,
            elem(keys.dtype),
        );
        if splits > 1 {
            attention::join::launch_unchecked(
                &client,
                CubeCount::Static((n * heads) as u32, 1, 1),
                CubeDim::new_1d(UNITS as u32),
                parts.into_buffer_arg(),
                stats.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                splits as u32,
                head_dim,
                plan.planes,
            );
        }
    }
    tensor(out)
}

fn shape(cube: &CubeTensor) -> [usize; 3] {
    cube.meta.shape().dims()
}

/// As [`attend`], for what [`prompt::takes`].
fn attend_prompt(
    q: CubeTensor,
    keys: &CubeTensor,
    values: CubeTensor,
    n_past: usize,
    window: Option<usize>,
) -> Tensor<2> {
    let [n, heads, head_dim] = shape(&q);
    let [kv_heads, capacity, _] = shape(keys);
    let out = empty(&q, [n, heads * head_dim], DType::F32);
    let client = q.client.clone();
    // SAFETY: cube (block, head) writes the queries of its block below `n`, at its head; it reads positions below
    // `n_past + n`, which the caches hold.
    unsafe {
        prompt::attend_prompt::launch_unchecked(
            &client,
            CubeCount::Static(n.div_ceil(prompt::QUERIES) as u32, heads as u32, 1),
            CubeDim::new_1d(prompt::UNITS as u32),
            q.into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            values.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            SpanLaunch::new(
                n_past as u32,
                window.unwrap_or(u32::MAX as usize) as u32,
                capacity as u32,
                0,
                1.0 / (head_dim as f32).sqrt(),
            ),
            n as u32,
            prompt::PromptPlan {
                group: heads / kv_heads,
                head_dim,
            },
            elem(keys.dtype),
        );
    }
    tensor(out)
}
