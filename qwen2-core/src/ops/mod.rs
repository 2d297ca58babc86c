//! The operations that decide the speed: one function each, taken to the kernel of the tensor's
//! backend where there is one, else to the portable default.

pub(crate) mod arena;
mod cache_bytes;
pub(crate) mod codes;
#[cfg(feature = "cpu")]
pub(crate) mod cpu;
pub(crate) mod fit;
#[cfg(feature = "gpu")]
mod gpu;
mod key_values;
mod lease;
mod linear;
mod low_rank;
pub(crate) mod packed;
pub(crate) mod portable;
mod visible;
pub(crate) mod watch;

use std::sync::{Mutex, PoisonError};

#[cfg(feature = "gpu")]
use burn::tensor::Int;
use burn::tensor::Tensor;

use crate::profile::part;

#[cfg(feature = "gpu")]
pub(crate) use gpu::check;
#[cfg(feature = "gpu")]
pub(crate) use gpu::replay;
#[cfg(feature = "gpu")]
pub(crate) use gpu::{
    attend_at, embed_at, embeds_places, mixture, on_gpu, takes_mixture, takes_places,
};
pub(crate) use key_values::{CACHE_BLOCK, CacheFormat, KeyValues, PAGE};
pub(crate) use lease::Lease;
pub(crate) use linear::{Linear, RmsNorm, Weight};
pub(crate) use low_rank::LowRank;
pub(crate) use visible::Visible;
pub(crate) use watch::{Watch, layer_done, watched};

/// Cosines and sines of the positions of one forward.
#[derive(Debug, Clone)]
pub(crate) struct RopeTables {
    /// `n` rows.
    pub(crate) keys: Angles,
    /// `rotations · n` rows.
    pub(crate) queries: Angles,
    /// As [`Visible`] has it.
    pub(crate) chunk: Option<usize>,
}

/// Cosines and sines, `[rows, head_dim / 2]` f32 each.
#[derive(Debug, Clone)]
pub(crate) struct Angles {
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
}

/// Where the token of a decode step is, as kernels find it on the device: so a step that was recorded is
/// computed again at the next place.
#[cfg(feature = "gpu")]
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// `[1]`
    pub(crate) token: Tensor<1, Int>,
    /// `[1]`: positions in the cache before it.
    pub(crate) n_past: Tensor<1, Int>,
    /// Of all positions that the cache has room for.
    pub(crate) angles: Angles,
}

/// `norm(x)` times each matrix, side by side: `x` `[n, in]` f32, result `[n, out + out…]` f32.
pub(crate) fn project<const N: usize>(
    x: &Tensor<2>,
    norm: &RmsNorm,
    matrices: [&Linear; N],
) -> Tensor<2> {
    let y = base_project(x, norm, matrices);
    low_rank::add_normed(y, x, norm, &matrices)
}

fn base_project<const N: usize>(
    x: &Tensor<2>,
    norm: &RmsNorm,
    matrices: [&Linear; N],
) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(x) {
        return cpu::project(x, norm, matrices);
    }
    #[cfg(feature = "gpu")]
    if gpu::takes(x) {
        return gpu::project(x, norm, matrices);
    }
    portable::project(x, norm, matrices)
}

/// On the host, or why not.
pub(crate) fn numbers(tensor: Tensor<2>) -> Result<Vec<f32>, String> {
    let data = tensor
        .try_into_data()
        .map_err(|error| format!("{error:?}"))?;
    let numbers = data.try_into_vec::<f32>();
    numbers.map_err(|error| format!("{error:?}"))
}

/// On the host, or why not.
#[cfg(feature = "gpu")]
pub(crate) fn integers(tensor: Tensor<1, Int>) -> Result<Vec<i32>, String> {
    let data = tensor
        .try_into_data()
        .map_err(|error| format!("{error:?}"))?;
    let integers = data.try_into_vec::<i32>();
    integers.map_err(|error| format!("{error:?}"))
}

/// The norm alone, `[n, hidden]`, once for a forward.
pub(crate) fn norm(x: Tensor<2>, norm: &RmsNorm) -> Tensor<2> {
    #[cfg(feature = "gpu")]
    if gpu::takes(&x) {
        return gpu::normed(&x, norm);
    }
    portable::rms_norm(x, norm)
}

/// The panels of the head whose logits [`screened_head`] computes exactly: 2,048 tokens.
const SCREENED_PANELS: usize = 128;
/// As many of the highest logits are exact at least, if the screen ranks them there.
pub(crate) const SCREENED_TOKENS: usize = SCREENED_PANELS;

/// As [`project`] of one token with a head of which `screen` is a copy in few bits: logits by the copy,
/// but where those are highest by the head itself. It reads half the bytes.
pub(crate) fn screened_head(
    x: &Tensor<2>,
    norm: &RmsNorm,
    head: &Linear,
    screen: &Weight,
) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(x) && head.adapters.is_empty() {
        return cpu::screened_head(x, norm, head, screen);
    }
    let _ = screen; // elsewhere all are exact
    project(x, norm, [head])
}

/// `h + x Wᵀ (+ b)`: `h` `[n, out]`, `x` `[n, in]`, f32.
pub(crate) fn add_project(h: Tensor<2>, x: Tensor<2>, matrix: &Linear) -> Tensor<2> {
    if matrix.adapters.is_empty() {
        return base_add_project(h, x, matrix);
    }
    low_rank::add(base_add_project(h, x.clone(), matrix), &x, matrix)
}

fn base_add_project(h: Tensor<2>, x: Tensor<2>, matrix: &Linear) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&x) {
        return cpu::add_project(h, x, matrix);
    }
    #[cfg(feature = "gpu")]
    if gpu::takes(&x) {
        return gpu::add_project(h, &x, matrix);
    }
    portable::add_project(h, x, matrix)
}

/// SwiGLU (arXiv:2002.05202) with its residual: `h + down(silu(gate(x)) · up(x))` with `x = norm(h)`,
/// `h` `[n, hidden]`; the matrices are gate, up and down.
pub(crate) fn mlp(h: Tensor<2>, norm: &RmsNorm, matrices: [&Linear; 3]) -> Tensor<2> {
    let is_plain = matrices.iter().all(|linear| linear.adapters.is_empty());
    #[cfg(feature = "cpu")]
    if is_plain && cpu::takes(&h) {
        return cpu::mlp(h, norm, matrices);
    }
    let [gate, up, down] = matrices;
    // [n, intermediate]
    let gated = part("norm, gate up", || match is_plain {
        #[cfg(feature = "gpu")]
        true if gpu::takes(&h) => gpu::swiglu(&h, norm, matrices),
        true => portable::swiglu(&h, norm, gate, up),
        false => low_rank::gated(project(&h, norm, [gate, up])),
    });
    part("down, add", || add_project(h, gated, down))
}

/// The tokens that an expert is for, each once and in order, and what its result counts for each.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Route {
    pub(crate) tokens: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

/// An expert, a SwiGLU network, and its tokens.
#[derive(Debug)]
pub(crate) struct Visit<'a> {
    pub(crate) gate: &'a Linear,
    pub(crate) up: &'a Linear,
    pub(crate) down: &'a Linear,
    pub(crate) route: Route,
}

/// The matrices of a layer's experts, all of one shape, each kind behind each other in one buffer: what
/// kernels of GPUs choose from by themselves.
#[cfg(feature = "gpu")]
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    /// The experts.
    pub(crate) count: usize,
    /// `[count · intermediate, hidden]`; the shape of a packed one is that of an expert.
    pub(crate) gate: Weight,
    pub(crate) up: Weight,
    /// `[count · hidden, intermediate]`.
    pub(crate) down: Weight,
}

/// A mixture of experts that are chosen where they are computed; see [`experts`].
#[cfg(feature = "gpu")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mixture<'a> {
    pub(crate) router: &'a Linear,
    pub(crate) shared_gate: &'a Linear,
    pub(crate) stack: &'a Stack,
    /// Gate, up and down of the expert that all tokens visit.
    pub(crate) shared: [&'a Linear; 3],
    pub(crate) num_experts_per_tok: usize,
    pub(crate) norm_topk_prob: bool,
}

/// A mixture of experts with its residual: `h[t] + Σ weight · down(silu(gate(x[t])) · up(x[t]))` with
/// `x = norm(h)`, over the visits that token `t` is part of; `h` `[n, hidden]`. Experts without tokens
/// are left out by the caller.
pub(crate) fn experts(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
    let is_plain = |linear: &Linear| linear.adapters.is_empty();
    if !visits
        .iter()
        .all(|visit| [visit.gate, visit.up, visit.down].into_iter().all(is_plain))
    {
        return low_rank::experts(h, norm, visits);
    }
    #[cfg(feature = "cpu")]
    if cpu::takes(&h) {
        return cpu::experts(h, norm, visits);
    }
    #[cfg(feature = "gpu")]
    if gpu::takes(&h) {
        return gpu::experts(h, norm, visits);
    }
    portable::experts(h, norm, visits)
}

/// Takes queries, keys and values apart (`qkv` `[n, (heads + 2 · kv_heads) · head_dim]`), gives
/// queries and keys their rotary embedding (arXiv:2104.09864, half-split pairing), and writes keys
/// and values to `pages`, those that they touch, from position `start` of the first on. The queries,
/// `[rotations · n, heads, head_dim]`: each in all its rotations.
pub(crate) fn append(
    qkv: Tensor<2>,
    tables: &RopeTables,
    pages: Vec<KeyValues>,
    start: usize,
) -> (Tensor<3>, Vec<KeyValues>) {
    #[cfg(feature = "cpu")]
    if cpu::takes(&qkv) {
        return cpu::append(qkv, tables, pages, start);
    }
    #[cfg(feature = "gpu")]
    if gpu::takes(&qkv) {
        return gpu::append(qkv, tables, pages, start);
    }
    portable::append(qkv, tables, pages, start)
}

/// Grouped-query attention (arXiv:2305.13245) of `q` `[rotations · n, heads, head_dim]` over the
/// pages of a cache, which are of one size; the result is `[n, heads · head_dim]`, scores and softmax
/// in f32. `rounds`: whether prefill may round queries, keys, weights and values to bf16.
pub(crate) fn attention(
    q: Tensor<3>,
    pages: &[KeyValues],
    visible: Visible,
    rounds: bool,
) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&q) {
        return cpu::attention(q, pages, visible, rounds);
    }
    #[cfg(not(feature = "cpu"))]
    let _ = rounds;
    #[cfg(feature = "gpu")]
    if gpu::takes(&q) {
        return gpu::attention(q, pages, visible);
    }
    portable::attention(q, pages, visible)
}

/// `x · y` in f32 to the last digit: burn takes fewer on some matrix units.
pub(crate) fn matmul<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "gpu")]
    if gpu::takes(&x) {
        return gpu::matmul(x, y);
    }
    x.matmul(y)
}

/// A tensor as the kernels want it for good: burn pads the rows of some on GPUs.
pub(crate) fn settled<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "gpu")]
    if gpu::takes(&tensor) {
        return gpu::settled(tensor);
    }
    tensor
}

/// Rows `tokens` of a matrix as f32, `[n, in_features]`: the matrix as an embedding table.
pub(crate) fn embed(table: &Weight, tokens: &[u32]) -> Tensor<2> {
    #[cfg(feature = "gpu")]
    if gpu::on_gpu(table) {
        return gpu::embed(table, tokens);
    }
    match table {
        Weight::Dense(table) => portable::embed(table, tokens),
        #[cfg(feature = "cpu")]
        Weight::Packed { shape, bytes } if bytes.device() == burn::tensor::Device::flex() => {
            cpu::packed_embed(*shape, bytes, tokens)
        }
        Weight::Packed { shape, bytes } => portable::packed_embed(*shape, bytes, tokens),
    }
}

/// What the kernels of the processor were compiled for and chose.
pub(crate) fn instruction_set() -> &'static str {
    #[cfg(feature = "cpu")]
    return cpu::simd::Isa::selected().name();
    #[cfg(not(feature = "cpu"))]
    return "portable";
}

/// The threads of one model, where its operations run on the processor.
#[derive(Clone, Debug)]
pub(crate) struct Threads {
    #[cfg(feature = "cpu")]
    pool: std::sync::Arc<cpu::pool::Pool>,
    n: usize,
}

impl Threads {
    /// `n` threads, or as many as the affinity and the cgroup of this process allow;
    /// `bf16_products`: whether prefill may round activations to bf16, where weights are.
    pub(crate) fn start(n: Option<usize>, bf16_products: bool) -> std::io::Result<Self> {
        let n = n.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        #[cfg(feature = "cpu")]
        let mut pool = cpu::pool::Pool::new(n)?;
        #[cfg(feature = "cpu")]
        {
            pool.bf16_products = bf16_products;
        }
        #[cfg(not(feature = "cpu"))]
        let _ = bf16_products;
        Ok(Self {
            #[cfg(feature = "cpu")]
            pool: std::sync::Arc::new(pool),
            n,
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.n
    }

    /// Whether they belong to the process that this one was forked from.
    pub(crate) fn are_foreign(&self) -> bool {
        #[cfg(feature = "cpu")]
        return self.pool.is_foreign();
        #[cfg(not(feature = "cpu"))]
        return false;
    }

    /// Calls `task(i)` for every `i` below `n_tasks`, shared among the threads.
    pub(crate) fn each(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        #[cfg(feature = "cpu")]
        return self.pool.run(n_tasks, task);
        #[cfg(not(feature = "cpu"))]
        return (0..n_tasks).for_each(task);
    }

    /// Calls `task(i, chunk)` for every stretch of `len` elements of `all`, shared among the threads.
    pub(crate) fn each_chunk<T: Send>(
        &self,
        all: &mut [T],
        len: usize,
        task: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let chunks: Vec<_> = all.chunks_mut(len).map(Mutex::new).collect();
        self.each(chunks.len(), &|i| {
            // Each lock is taken once, by its own task.
            let mut chunk = chunks[i].lock().unwrap_or_else(PoisonError::into_inner);
            task(i, &mut chunk);
        });
    }

    /// Runs `body` with these threads at the service of its operations.
    pub(crate) fn install<R>(&self, body: impl FnOnce() -> R) -> R {
        #[cfg(feature = "cpu")]
        return cpu::pool::with_pool(&self.pool, body);
        #[cfg(not(feature = "cpu"))]
        return body();
    }
}
