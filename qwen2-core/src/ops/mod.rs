//! The operations that decide the speed: one function each, taken to the kernel of the tensor's
//! backend where there is one, else to the portable default.

#[cfg(feature = "cpu")]
pub(crate) mod cpu;
pub(crate) mod packed;
pub(crate) mod portable;
mod visible;

use burn::tensor::{Int, Tensor};

pub(crate) use visible::Visible;

/// `x Wᵀ + b`: `x` `[n, in]` f32, `weight` `[out, in]` as stored, result `[n, out]` f32.
pub(crate) fn linear(x: Tensor<2>, weight: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&x) {
        return cpu::linear(x, weight, bias);
    }
    portable::linear(x, weight, bias)
}

/// As [`linear`], over a packed weight of `shape`.
pub(crate) fn packed_linear(
    x: Tensor<2>,
    shape: packed::Shape,
    bytes: &Tensor<1, Int>,
    bias: Option<&Tensor<1>>,
) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&x) {
        return cpu::packed_linear(x, shape, bytes, bias);
    }
    portable::packed_linear(x, shape, bytes, bias)
}

/// Rows of a packed embedding table as f32, `[n, hidden]`.
pub(crate) fn packed_embed(
    shape: packed::Shape,
    bytes: &Tensor<1, Int>,
    tokens: &[u32],
) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if bytes.device() == burn::tensor::Device::flex() {
        return cpu::packed_embed(shape, bytes, tokens);
    }
    portable::packed_embed(shape, bytes, tokens)
}

/// Root mean square norm (arXiv:1910.07467) over the last dimension; `x` `[n, hidden]`.
pub(crate) fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&x) {
        return cpu::rms_norm(x, weight, eps);
    }
    portable::rms_norm(x, weight, eps)
}

/// Rotary embedding (arXiv:2104.09864), half-split pairing: `x` `[n, heads, head_dim]`,
/// `cos` and `sin` `[n, head_dim / 2]` f32.
pub(crate) fn rope(x: Tensor<3>, cos: &Tensor<2>, sin: &Tensor<2>) -> Tensor<3> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&x) {
        return cpu::rope(x, cos, sin);
    }
    portable::rope(x, cos, sin)
}

/// `silu(gate) · up`, element by element, `[n, intermediate]`.
pub(crate) fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&gate) {
        return cpu::swiglu(gate, up);
    }
    portable::swiglu(gate, up)
}

/// Grouped-query attention of `q` `[n, heads, head_dim]` over the cache `[kv_heads, capacity,
/// head_dim]`; the result is `[n, heads · head_dim]`, softmax in f32.
pub(crate) fn attention(
    q: Tensor<3>,
    keys: &Tensor<3>,
    values: &Tensor<3>,
    visible: Visible,
) -> Tensor<2> {
    #[cfg(feature = "cpu")]
    if cpu::takes(&q) {
        return cpu::attention(q, keys, values, visible);
    }
    portable::attention(q, keys, values, visible)
}

/// Rows of the embedding table as f32: `table` `[vocab_size, hidden]`, result `[n, hidden]`.
pub(crate) fn embed(table: &Tensor<2>, tokens: &[u32]) -> Tensor<2> {
    portable::embed(table, tokens)
}

/// The threads of one model, where its operations run on the processor.
#[derive(Debug)]
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

    /// Runs `body` with these threads at the service of its operations.
    pub(crate) fn install<R>(&self, body: impl FnOnce() -> R) -> R {
        #[cfg(feature = "cpu")]
        return cpu::pool::with_pool(&self.pool, body);
        #[cfg(not(feature = "cpu"))]
        return body();
    }
}
