//! Matrix products on CUDA by cubek's kernels, chosen for what the device has.

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::routines::batch::double_unit::DoubleUnitSelectionArgs;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple_unit::SimpleUnitSelectionArgs;
use cubek::matmul::routine::BlueprintStrategy::Inferred;
use cubek::std::InputBinding;

use super::cube::{cube, elem, empty, raw, tensor};

/// `x Wᵀ`, both in bf16, sums and result in f32.
pub(super) fn bf16(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    // The fastest first, as measured on an H200: Hopper's bulk copies, then double buffers, then what
    // every device takes.
    let double = OrderedSelectionArgs {
        partition_k: Some(2),
        row_count: Some(4),
        rows_per_plane: Some(2),
        tile_matmul: TileMatmulKind::Mma,
    };
    product(
        x,
        weight,
        &[
            Strategy::SpecializedTmaMma(Inferred(().into())).into(),
            Strategy::OrderedDoubleMma(Inferred(double)).into(),
            cubek::matmul::strategy::Strategy::Auto,
        ],
    )
}

/// `x Wᵀ` in f32: not in tf32, which matrix units of NVIDIA make of it and burn takes.
pub(super) fn f32(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    product(
        x,
        weight,
        &[
            Strategy::DoubleUnit(Inferred(DoubleUnitSelectionArgs::default())).into(),
            Strategy::SimpleUnit(Inferred(SimpleUnitSelectionArgs::default())).into(),
        ],
    )
}

/// By the first of the strategies that takes the matrices.
fn product(
    x: Tensor<2>,
    weight: Tensor<2>,
    strategies: &[cubek::matmul::strategy::Strategy],
) -> Tensor<2> {
    let [n, _] = x.dims();
    let [rows, _] = weight.dims();
    let x = cube(x);
    let weight = raw(weight.transpose());
    let out = empty(&x, [n, rows], DType::F32);
    let launched = strategies
        .iter()
        .map(|strategy| launch(strategy, &x, &weight, &out));
    let failed: Vec<_> = launched.take_while(Result::is_err).collect();
    if failed.len() == strategies.len() {
        panic!("no product of these matrices: {failed:?}"); // as burn reports; see fence.rs
    }
    tensor(out)
}

fn launch(
    strategy: &cubek::matmul::strategy::Strategy,
    x: &CubeTensor,
    weight: &CubeTensor,
    out: &CubeTensor,
) -> Result<(), String> {
    let mut types = MatmulElems::from_globals(&MatmulGlobalElems {
        lhs: elem(x.dtype),
        rhs: elem(weight.dtype),
        out: elem(out.dtype),
    });
    let input =
        |tensor: &CubeTensor| InputBinding::new(tensor.clone().binding(), elem(tensor.dtype));
    cubek::matmul::launch::launch_ref(
        strategy,
        &x.client,
        input(x),
        input(weight),
        out.clone().binding(),
        &mut types,
    )
    .map_err(|error| format!("{error:?}"))
}
