//! The keys and values of one sequence, in buffers that grow in steps up to the context.

use burn::tensor::{Device, Tensor};

use crate::error::{Error, ErrorKind, Result};
use crate::ops::{self, CACHE_BLOCK, CacheFormat, KeyValues, RopeTables};

/// Positions that a fresh cache has room for.
const FIRST_CAPACITY: usize = 256;

/// What one sequence has gone through: `n_tokens` positions in every layer.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    layers: Vec<LayerCache>,
    n_tokens: usize,
    capacity: usize,
    /// Positions that will come at least, as far as is known.
    expected: usize,
    /// Whether its keys have the rotations of long sequences.
    long: bool,
    context_length: usize,
    shape: CacheShape,
}

/// What the buffers of every layer have in common.
#[derive(Debug, Clone)]
pub(crate) struct CacheShape {
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) format: CacheFormat,
    pub(crate) device: Device,
}

/// The buffers of one layer; `None` only while they are written.
#[derive(Debug, Clone)]
pub(crate) struct LayerCache(Option<KeyValues>);

impl Cache {
    /// An empty cache for sequences of up to `context_length` tokens.
    pub(crate) fn new(shape: CacheShape, context_length: usize) -> Self {
        Self {
            layers: Vec::new(),
            n_tokens: 0,
            capacity: 0,
            expected: 0,
            long: false,
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

    /// Says how many positions there will be at least, so that it grows to that at once.
    pub(crate) fn expect(&mut self, n_tokens: usize) {
        self.expected = n_tokens;
    }

    /// Whether its keys have the rotations of long sequences.
    pub(crate) fn is_long(&self) -> bool {
        self.long
    }

    /// Changes the rotations, and so forgets what was computed with others.
    pub(crate) fn set_long(&mut self, long: bool) {
        if self.long != long {
            self.long = long;
            self.n_tokens = 0;
        }
    }

    /// Bytes of its buffers.
    pub(crate) fn bytes(&self) -> u64 {
        let s = &self.shape;
        (2 * s.num_hidden_layers
            * s.num_key_value_heads
            * self.capacity
            * s.format.row_bytes(s.head_dim)) as u64
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
                .max(self.expected)
                .max(FIRST_CAPACITY)
                .min(self.context_length)
                .next_multiple_of(CACHE_BLOCK);
            self.grow(capacity);
        }
        Ok(())
    }

    fn grow(&mut self, capacity: usize) {
        let s = &self.shape;
        let dims = [s.num_key_value_heads, capacity, s.head_dim];
        let empty = || KeyValues::zeros(s.format, dims, &s.device);
        // Whole blocks, since their order inside is the kernels' own.
        let kept = self.n_tokens.next_multiple_of(CACHE_BLOCK);
        let old = std::mem::take(&mut self.layers);
        self.layers = if old.is_empty() || kept == 0 {
            (0..s.num_hidden_layers)
                .map(|_| LayerCache(Some(empty())))
                .collect()
        } else {
            old.into_iter()
                .map(|layer| LayerCache(layer.0.map(|old| empty().take_over(old, kept))))
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
    /// Writes the keys and values of `qkv` behind `n_past`; the queries, as [`ops::append`] has them.
    pub(crate) fn append(
        &mut self,
        qkv: Tensor<2>,
        tables: &RopeTables,
        n_past: usize,
    ) -> Tensor<3> {
        // The only handle is taken, so that the backend writes in place.
        let Some(own) = self.0.take() else {
            unreachable!("a failure between taking and putting back clears the cache");
        };
        let (q, own) = ops::append(qkv, tables, own, n_past);
        self.0 = Some(own);
        q
    }

    pub(crate) fn key_values(&self) -> &KeyValues {
        let Some(buffers) = &self.0 else {
            unreachable!("as in append");
        };
        buffers
    }
}
