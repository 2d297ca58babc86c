//! The keys and values of one sequence, in buffers that grow in steps up to the context.

use burn::tensor::{DType, Device, Tensor};

use crate::error::{Error, ErrorKind, Result};

/// Positions that a fresh cache has room for.
const FIRST_CAPACITY: usize = 256;

/// What one sequence has gone through: `n_tokens` positions in every layer.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    layers: Vec<LayerCache>,
    n_tokens: usize,
    capacity: usize,
    context_length: usize,
    shape: CacheShape,
}

/// What the buffers of every layer have in common.
#[derive(Debug, Clone)]
pub(crate) struct CacheShape {
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
}

/// The buffers of one layer, `[kv_heads, capacity, head_dim]` each.
#[derive(Debug, Clone)]
pub(crate) struct LayerCache {
    keys: Tensor<3>,
    values: Tensor<3>,
}

impl Cache {
    /// An empty cache for sequences of up to `context_length` tokens.
    pub(crate) fn new(shape: CacheShape, context_length: usize) -> Self {
        Self {
            layers: Vec::new(),
            n_tokens: 0,
            capacity: 0,
            context_length,
            shape,
        }
    }

    /// Positions that are filled.
    pub(crate) fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Positions that this cache may ever hold.
    pub(crate) fn context_length(&self) -> usize {
        self.context_length
    }

    /// Bytes of its buffers.
    pub(crate) fn bytes(&self) -> u64 {
        let s = &self.shape;
        (2 * s.num_hidden_layers
            * s.num_key_value_heads
            * self.capacity
            * s.head_dim
            * s.dtype.size()) as u64
    }

    /// Makes room for `n` more positions.
    ///
    /// # Errors
    /// `ContextOverflow` if they do not fit the context; the cache is unchanged.
    pub(crate) fn reserve(&mut self, n: usize) -> Result<()> {
        let needed = self.n_tokens + n;
        if needed > self.context_length {
            return Err(Error::new(ErrorKind::ContextOverflow, "context is full")
                .with_why(format!(
                    "{needed} tokens, the context holds {}",
                    self.context_length
                ))
                .with_help("shorten the prompt or ask for fewer new tokens"));
        }
        if needed > self.capacity {
            // Doubling: the copies cost less than one more pass over what they hold.
            let capacity = needed
                .max(2 * self.capacity)
                .max(FIRST_CAPACITY)
                .min(self.context_length);
            self.grow(capacity);
        }
        Ok(())
    }

    fn grow(&mut self, capacity: usize) {
        let s = &self.shape;
        let dims = [s.num_key_value_heads, capacity, s.head_dim];
        let empty = || Tensor::<3>::zeros(dims, (&s.device, s.dtype));
        let n_tokens = self.n_tokens;
        let copy = |old: Tensor<3>| {
            let kept = old.narrow(1, 0, n_tokens);
            empty().slice_assign([0..dims[0], 0..n_tokens, 0..dims[2]], kept)
        };
        let old = std::mem::take(&mut self.layers);
        self.layers = if old.is_empty() || n_tokens == 0 {
            (0..s.num_hidden_layers)
                .map(|_| LayerCache {
                    keys: empty(),
                    values: empty(),
                })
                .collect()
        } else {
            old.into_iter()
                .map(|layer| LayerCache {
                    keys: copy(layer.keys),
                    values: copy(layer.values),
                })
                .collect()
        };
        self.capacity = capacity;
    }

    /// The layers, and the position where the next tokens go.
    pub(crate) fn parts(&mut self) -> (&mut [LayerCache], usize) {
        (&mut self.layers, self.n_tokens)
    }

    /// Counts `n` positions that every layer has written.
    pub(crate) fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Forgets all but the first `n_tokens` positions.
    pub(crate) fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
    }

    /// Forgets everything, buffers included: what is left after a failure in mid-write.
    pub(crate) fn clear(&mut self) {
        self.layers.clear();
        self.n_tokens = 0;
        self.capacity = 0;
    }
}

impl LayerCache {
    /// Writes `k` and `v`, `[n, kv_heads, head_dim]`, to the positions from `start` on.
    pub(crate) fn write(&mut self, k: Tensor<3>, v: Tensor<3>, start: usize) {
        for (buffer, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            let [n, kv_heads, head_dim] = new.dims();
            let new = new.swap_dims(0, 1).cast(buffer.dtype());
            // The only handle is taken, so that the backend writes in place.
            let own = std::mem::replace(buffer, new.clone());
            *buffer = own.slice_assign([0..kv_heads, start..start + n, 0..head_dim], new);
        }
    }

    pub(crate) fn keys(&self) -> &Tensor<3> {
        &self.keys
    }

    pub(crate) fn values(&self) -> &Tensor<3> {
        &self.values
    }
}
