//! Matrix products on CUDA by cubek's kernels, chosen for what the device has.

use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::cubecl::ir::AddressType;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems, MatmulProblem};
use cubek::matmul::multi_level::Strategy;
use cubek::matmul::multi_level::components::global::{InputLoadFlow, LoadFlows};
use cubek::matmul::multi_level::components::stage::PartitionBuffering;
use cubek::matmul::multi_level::components::tile::TileMatmulKind;
use cubek::matmul::multi_level::definition::{BatchMatmulBlueprint, TilingScheme};
use cubek::matmul::multi_level::routines::batch::double_unit::DoubleUnitSelectionArgs;
use cubek::matmul::multi_level::routines::batch::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::multi_level::routines::batch::simple_unit::SimpleUnitSelectionArgs;
use cubek::matmul::multi_level::stage::{SwizzleMode, SwizzleModes};
use cubek::matmul::routine::BlueprintStrategy::{Forced, Inferred};
use cubek::std::cube_count::{CubeCountStrategy, GlobalOrder, HypercubeBlueprint, SmAllocation};
use cubek::std::{InputBinding, MatrixLayout};

use super::cube::{cube, elem, empty, raw, tensor};

/// Rows that a cube may have, the most first.
pub(super) const ROWS: [usize; 3] = [256, 128, 64];
/// Columns of a cube.
const COLUMNS: usize = 128;
/// Units of a plane.
const PLANE: u32 = 32;

/// `x Wᵀ`, both in bf16, sums and result in f32.
pub(super) fn bf16(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    // Hopper's bulk copies, with our tiles and with cubek's, then double buffers, then what every device takes.
    let double = OrderedSelectionArgs {
        partition_k: Some(2),
        row_count: Some(4),
        rows_per_plane: Some(2),
        tile_matmul: TileMatmulKind::Mma,
    };
    let tiles = tiles(&x, &weight, rows_at_once(&x, &weight));
    product(
        x,
        weight.transpose(),
        &[
            Strategy::SpecializedTmaMma(Forced(tiles)).into(),
            Strategy::SpecializedTmaMma(Inferred(().into())).into(),
            Strategy::OrderedDoubleMma(Inferred(double)).into(),
            cubek::matmul::strategy::Strategy::Auto,
        ],
    )
}

/// The rows of a cube that let the whole device take least turns; less rows reuse less.
fn rows_at_once(x: &Tensor<2>, weight: &Tensor<2>) -> usize {
    let ([m, _], [n, _]) = (x.dims(), weight.dims());
    let cubes = multiprocessors(x) as usize;
    let turns = |rows: usize| (m.div_ceil(rows) * n.div_ceil(COLUMNS)).div_ceil(cubes);
    let cost = |&rows: &usize| match rows {
        256 => turns(rows) * 100,
        128 => turns(rows) * 55,
        _ => turns(rows) * 32,
    };
    ROWS.into_iter().min_by_key(cost).expect("there are some")
}

fn multiprocessors(x: &Tensor<2>) -> u32 {
    let client = raw(x.clone()).client;
    let hardware = &client.properties().hardware;
    hardware.num_streaming_multiprocessors.unwrap_or(1)
}

/// What a cube computes, and its planes.
///
/// A plane has 64 by 32 sums: for 16 products of 16 × 8 × 16 it reads four matrices of `x` and four of the weight from
/// shared memory, where cubek's own 16 by 128 reads one and sixteen; shared memory is what limits those.
fn tiles(x: &Tensor<2>, weight: &Tensor<2>, rows: usize) -> BatchMatmulBlueprint {
    let ([m, k], [n, _]) = (x.dims(), weight.dims());
    let scheme = TilingScheme::builder()
        .with_tile_size((16, 8, 16).into())
        .with_partition_size((4, 4, 2).into())
        .with_stage_size((rows as u32 / 64, COLUMNS as u32 / 32, 1).into())
        .build()
        .expect("all sizes are given");
    let dtypes = MatmulGlobalElems {
        lhs: elem(DType::BF16),
        rhs: elem(DType::BF16),
        out: elem(DType::F32),
    };
    let problem = MatmulProblem::from_parameters(
        m,
        n,
        k,
        Shape::new([1]),
        Shape::new([1]),
        MatrixLayout::RowMajor,
        MatrixLayout::ColMajor,
        MatrixLayout::RowMajor,
        None,
        None,
        dtypes,
        AddressType::default(),
    );
    let order = HypercubeBlueprint::builder()
        .global_order(GlobalOrder::SwizzleRow(4))
        .cube_count_strategy(CubeCountStrategy::Sm {
            num_sms: multiprocessors(x),
            sm_usage: SmAllocation::Exact,
            cubes_first: true,
        })
        .build();
    BatchMatmulBlueprint::builder(TileMatmulKind::Mma, scheme, PLANE, &problem)
        .partition_buffering(PartitionBuffering::Double)
        .stage_buffering(2)
        .hypercube_blueprint(order)
        .load_specialization_config(LoadFlows {
            lhs: InputLoadFlow::LoadOnly,
            rhs: InputLoadFlow::LoadOnly,
        })
        // Rows of 32 numbers in 64 bytes.
        .shared_swizzle(SwizzleModes {
            lhs: SwizzleMode::B64,
            rhs: SwizzleMode::B64,
            ..Default::default()
        })
        .build()
}

/// `x · y` in f32: not in tf32, which matrix units of NVIDIA make of it and burn takes.
pub(super) fn f32<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    product(
        x,
        y,
        &[
            Strategy::DoubleUnit(Inferred(DoubleUnitSelectionArgs::default())).into(),
            Strategy::SimpleUnit(Inferred(SimpleUnitSelectionArgs::default())).into(),
        ],
    )
}

/// As [`bf16`], with cubes of so many rows or not at all.
#[cfg(test)]
pub(super) fn bf16_by(rows: usize, x: Tensor<2>, weight: Tensor<2>) -> Result<Tensor<2>, String> {
    let tiles = tiles(&x, &weight, rows);
    try_product(
        x,
        weight.transpose(),
        &[Strategy::SpecializedTmaMma(Forced(tiles)).into()],
    )
}

fn product<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    strategies: &[cubek::matmul::strategy::Strategy],
) -> Tensor<D> {
    try_product(x, y, strategies)
        .unwrap_or_else(|why| panic!("no product of these matrices: {why}")) // as burn reports; see fence.rs
}

/// By the first of the strategies that takes the matrices.
fn try_product<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    strategies: &[cubek::matmul::strategy::Strategy],
) -> Result<Tensor<D>, String> {
    let mut dims = x.dims();
    dims[D - 1] = y.dims()[D - 1];
    let (x, y) = (cube(x), raw(y));
    let out = empty(&x, dims, DType::F32);
    let launched = strategies
        .iter()
        .map(|strategy| launch(strategy, &x, &y, &out));
    let failed: Vec<_> = launched.take_while(Result::is_err).collect();
    if failed.len() == strategies.len() {
        return Err(format!("{failed:?}"));
    }
    Ok(tensor(out))
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
