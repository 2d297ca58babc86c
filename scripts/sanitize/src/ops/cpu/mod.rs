//! Stands in for `qwen2-core/src/ops/cpu/mod.rs`, without tensors.

#[path = "../../../../../qwen2-core/src/ops/cpu/activations.rs"]
mod activations;
#[path = "../../../../../qwen2-core/src/ops/cpu/amx.rs"]
mod amx;
#[path = "../../../../../qwen2-core/src/ops/cpu/attention.rs"]
mod attention;
#[path = "../../../../../qwen2-core/src/ops/cpu/bf16_gemm.rs"]
mod bf16_gemm;
#[path = "../../../../../qwen2-core/src/ops/cpu/dense_gemm.rs"]
mod dense_gemm;
#[path = "../../../../../qwen2-core/src/ops/cpu/elementwise.rs"]
mod elementwise;
#[path = "../../../../../qwen2-core/src/ops/cpu/filled.rs"]
mod filled;
#[path = "../../../../../qwen2-core/src/ops/cpu/fit.rs"]
pub(super) mod fit;
#[path = "../../../../../qwen2-core/src/ops/cpu/interleave.rs"]
mod interleave;
#[path = "../../../../../qwen2-core/src/ops/cpu/layout.rs"]
mod layout;
#[path = "../../../../../qwen2-core/src/ops/cpu/cut.rs"]
mod cut;
#[path = "../../../../../qwen2-core/src/ops/cpu/lines.rs"]
mod lines;
#[path = "../../../../../qwen2-core/src/ops/cpu/matmul.rs"]
mod matmul;
#[path = "../../../../../qwen2-core/src/ops/cpu/neon.rs"]
mod neon;
#[path = "../../../../../qwen2-core/src/ops/cpu/neon_tile.rs"]
mod neon_tile;
#[path = "../../../../../qwen2-core/src/ops/cpu/packed_tile.rs"]
mod packed_tile;
#[path = "../../../../../qwen2-core/src/ops/cpu/pool.rs"]
pub(crate) mod pool;
#[path = "../../../../../qwen2-core/src/ops/cpu/product.rs"]
mod product;
#[path = "../../../../../qwen2-core/src/ops/cpu/quantized.rs"]
mod quantized;
#[path = "../../../../../qwen2-core/src/ops/cpu/simd.rs"]
pub(crate) mod simd;
#[path = "../../../../../qwen2-core/src/ops/cpu/x86.rs"]
mod x86;
#[path = "../../../../../qwen2-core/src/ops/cpu/x86_tile.rs"]
mod x86_tile;
