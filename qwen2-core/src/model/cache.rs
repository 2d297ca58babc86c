//! The keys and values of one sequence, in pages that come as it grows.

use std::ops::Range;
#[cfg(feature = "gpu")]
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

#[cfg(feature = "gpu")]
use super::replay::Replay;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::arena::Arena;
use crate::ops::{self, CACHE_BLOCK, CacheFormat, KeyValues, Lease, PAGE, RopeTables};

/// Positions that a fresh cache of one page has room for.
const FIRST_CAPACITY: usize = 256;

/// What one sequence has gone through: `n_tokens` positions in every layer.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    #[cfg(feature = "gpu")]
    pub(super) replay: Replay,
    layers: Vec<LayerCache>,
    n_tokens: usize,
    capacity: usize,
    /// Positions that will come at least, as far as is known.
    expected: usize,
    /// Whether its keys have the rotations of long sequences.
    long: bool,
    context_length: usize,
    shape: CacheShape,
    /// One for all caches that share buffers.
    #[cfg(feature = "gpu")]
    buffers: Arc<()>,
}

/// What the buffers of every layer have in common.
#[derive(Debug, Clone)]
pub(crate) struct CacheShape {
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) format: CacheFormat,
    pub(crate) device: Device,
    /// Behind everything else of a network and of a cache, so that it ends when they have.
    #[allow(dead_code)] // its end is what it is for
    pub(crate) lease: Lease,
}

/// The pages of one layer, in order. On the processor they are of [`PAGE`] positions, and those that
/// caches have in common are shared until one of them writes. Elsewhere there is one, which grows:
/// kernels of GPUs want one buffer.
#[derive(Debug, Clone, Default)]
pub(crate) struct LayerCache(Vec<KeyValues>);

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
            #[cfg(feature = "gpu")]
            replay: Replay::default(),
            #[cfg(feature = "gpu")]
            buffers: Arc::default(),
        }
    }

    /// Whether another cache has the same buffers; a write gives this one its own.
    #[cfg(feature = "gpu")]
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.buffers) > 1
    }

    /// Positions that it has room for.
    #[cfg(feature = "gpu")]
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets a recorded step, as buffers change, or what it computes with.
    fn forget_replay(&mut self) {
        #[cfg(feature = "gpu")]
        {
            self.replay = Replay::default();
            self.buffers = Arc::default();
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
            self.forget_replay();
            self.long = long;
            self.n_tokens = 0;
        }
    }

    /// Bytes of its buffers.
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.bytes(self.capacity)
    }

    /// Bytes of its buffers once it holds `n_tokens` positions.
    pub(crate) fn bytes_for(&self, n_tokens: usize) -> u64 {
        let step = match self.shape.is_paged() {
            true => self.page_capacity(),
            false => CACHE_BLOCK,
        };
        let capacity = n_tokens.next_multiple_of(step).max(self.capacity);
        self.shape.bytes(capacity)
    }

    /// Whether it shares the memory of the pages that it gives and adopts; else they are copies.
    pub(crate) fn shares_pages(&self) -> bool {
        self.shape.is_paged()
    }

    /// Positions of a page.
    pub(crate) fn page_capacity(&self) -> usize {
        PAGE.min(self.context_length.next_multiple_of(CACHE_BLOCK))
    }

    /// Bytes of `n` pages.
    pub(crate) fn bytes_of_pages(&self, n: usize) -> u64 {
        self.shape.bytes(n * self.page_capacity())
    }

    /// The positions from `index` pages on, of which it holds one at least.
    pub(crate) fn page(&self, index: usize) -> Page {
        let capacity = self.page_capacity();
        let start = index * capacity;
        let kept = self.n_tokens.next_multiple_of(CACHE_BLOCK) - start;
        let of = |layer: &LayerCache| match self.shape.is_paged() {
            true => layer.0[index].clone(),
            false => {
                let page = self.shape.zeros(capacity, None);
                page.take_over(layer.0[0].clone(), start, 0..kept.min(capacity))
            }
        };
        Page {
            layers: self.layers.iter().map(of).collect(),
            bytes: self.shape.bytes(capacity),
        }
    }

    /// Takes over the first `n_tokens` positions of `pages` in place of what it holds.
    pub(crate) fn adopt(&mut self, pages: Vec<Page>, n_tokens: usize) {
        if !self.shape.is_paged() {
            return self.copy_in(&pages, n_tokens);
        }
        self.clear();
        self.layers
            .resize_with(self.shape.num_hidden_layers, LayerCache::default);
        for page in pages {
            self.capacity += page.capacity();
            for (layer, page) in self.layers.iter_mut().zip(page.layers) {
                layer.0.push(page);
            }
        }
        self.n_tokens = n_tokens;
    }

    fn copy_in(&mut self, pages: &[Page], n_tokens: usize) {
        #[cfg(feature = "gpu")]
        if self.is_shared() {
            self.forget_replay(); // written, the buffers are its own
        }
        self.n_tokens = 0;
        if n_tokens > self.capacity {
            self.grow(n_tokens);
        }
        let capacity = self.page_capacity();
        let n_pages = n_tokens.div_ceil(capacity);
        for (index, page) in pages.iter().take(n_pages).enumerate() {
            let start = index * capacity;
            let end = n_tokens.next_multiple_of(CACHE_BLOCK).min(start + capacity);
            for (layer, page) in self.layers.iter_mut().zip(&page.layers) {
                let own = layer
                    .0
                    .pop()
                    .map(|own| own.take_over(page.clone(), 0, start..end));
                layer.0.extend(own); // the only handle, written in place
            }
        }
        self.n_tokens = n_tokens;
    }

    /// What it is, for another sequence to go on in; it is empty then.
    pub(crate) fn leave(&mut self) -> Self {
        let empty = Self::new(self.shape.clone(), self.context_length);
        std::mem::replace(self, empty)
    }

    /// Takes the buffers of another cache of the network in place of its own, and a step recorded over them.
    /// Where they do not fit it stays as it is.
    pub(crate) fn go_on_in(&mut self, other: Self) {
        if (self.context_length, self.long) == (other.context_length, other.long) {
            let (n_tokens, expected) = (0, self.expected);
            *self = Self {
                n_tokens,
                expected,
                ..other
            };
        }
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
        #[cfg(feature = "gpu")]
        if !self.replay.is_in_order() {
            self.forget_replay();
        }
        if needed > self.capacity {
            self.grow(needed);
        }
        Ok(())
    }

    fn grow(&mut self, needed: usize) {
        self.forget_replay();
        self.layers
            .resize_with(self.shape.num_hidden_layers, LayerCache::default);
        if self.shape.is_paged() {
            let page = self.page_capacity();
            while self.capacity < needed {
                // Huge pages take memory for what is not there yet: where a page is filled at once, for nothing.
                let is_filled = self.capacity + page <= needed;
                let mut arena =
                    is_filled.then(|| Arena::of_chunks(self.shape.bytes(page) as usize));
                for layer in &mut self.layers {
                    layer.0.push(self.shape.zeros(page, arena.as_mut()));
                }
                self.capacity += page;
            }
            return;
        }
        // Doubling: the copies cost less than one more pass over what they hold.
        let capacity = needed
            .max(2 * self.capacity)
            .max(self.expected)
            .max(FIRST_CAPACITY)
            .min(self.context_length)
            .next_multiple_of(CACHE_BLOCK);
        // Whole blocks, since their order inside is the kernels' own.
        let kept = self.n_tokens.next_multiple_of(CACHE_BLOCK);
        for layer in &mut self.layers {
            let new = self.shape.zeros(capacity, None);
            layer.0 = match layer.0.pop() {
                Some(old) if kept > 0 => vec![new.take_over(old, 0, 0..kept)],
                _ => vec![new],
            };
        }
        self.capacity = capacity;
    }

    /// The layers, and the position where the next tokens go.
    pub(crate) fn parts(&mut self) -> (&mut [LayerCache], usize) {
        (&mut self.layers, self.n_tokens)
    }

    /// Counts `n` positions that every layer has written.
    pub(crate) fn advance(&mut self, n: usize) {
        #[cfg(feature = "gpu")]
        {
            if self.is_shared() {
                self.forget_replay(); // written, the buffers are its own
            }
            self.replay.count(n);
        }
        self.n_tokens += n;
    }

    /// Forgets all but the first `n_tokens` positions.
    pub(crate) fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
    }

    /// Gives what it holds, as [`Self::import`] takes it, to `write`, piece by piece.
    ///
    /// # Errors
    /// Those of `write`.
    pub(crate) fn export(&self, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        for layer in &self.layers {
            for at in stretches(self.n_tokens) {
                let (page, at) = layer.place(at);
                write(&layer.0[page].bytes_of(at))?;
            }
        }
        Ok(())
    }

    /// Takes over what another cache of this kind held, `n_tokens` positions; `read` fills the pieces
    /// that were written.
    ///
    /// # Errors
    /// Those of `read`, and then it is empty; `ContextOverflow`.
    pub(crate) fn import(
        &mut self,
        n_tokens: usize,
        long: bool,
        read: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.clear();
        self.long = long;
        self.reserve(n_tokens)?;
        let mut bytes = Vec::new();
        for layer in &mut self.layers {
            for at in stretches(n_tokens) {
                let (page, at) = layer.place(at);
                bytes.resize(layer.0[page].len_of(at.len()), 0);
                read(&mut bytes)?;
                let own = layer.0.remove(page); // the only handle, to be written in place
                layer.0.insert(page, own.with_bytes(at, &bytes));
            }
        }
        self.n_tokens = n_tokens;
        Ok(())
    }

    /// Forgets everything, buffers included: what is left after a failure in mid-write.
    pub(crate) fn clear(&mut self) {
        self.forget_replay();
        self.layers.clear();
        self.n_tokens = 0;
        self.capacity = 0;
    }
}

/// The same positions in every layer. A clone shares the memory until one of both is written.
#[derive(Debug, Clone)]
pub(crate) struct Page {
    layers: Vec<KeyValues>,
    bytes: u64,
}

impl Page {
    /// Positions that it has room for.
    pub(crate) fn capacity(&self) -> usize {
        self.layers[0].capacity()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl CacheShape {
    /// Of `n` positions.
    fn bytes(&self, n: usize) -> u64 {
        let row = self.format.row_bytes(self.head_dim);
        (2 * self.num_hidden_layers * self.num_key_value_heads * n * row) as u64
    }

    fn is_paged(&self) -> bool {
        self.device == Device::flex()
    }

    fn zeros(&self, capacity: usize, arena: Option<&mut Arena>) -> KeyValues {
        let dims = [self.num_key_value_heads, capacity, self.head_dim];
        KeyValues::zeros_in(arena, self.format, dims, &self.device)
    }
}

/// Whole blocks that cover `n_tokens` positions, those of a page at a time.
fn stretches(n_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let end = n_tokens.next_multiple_of(CACHE_BLOCK);
    (0..end)
        .step_by(PAGE)
        .map(move |start| start..end.min(start + PAGE))
}

impl LayerCache {
    /// Writes the keys and values of `qkv` behind `n_past`; the queries, as [`ops::append`] has them.
    pub(crate) fn append(
        &mut self,
        qkv: Tensor<2>,
        tables: &RopeTables,
        n_past: usize,
    ) -> Tensor<3> {
        let capacity = self.0[0].capacity();
        let first = n_past / capacity;
        let end = (n_past + qkv.dims()[0]).div_ceil(capacity);
        // The handles are taken, so that the backend writes in place what no other cache shares.
        let touched = self.0.drain(first..end).collect();
        let (q, touched) = ops::append(qkv, tables, touched, n_past - first * capacity);
        self.0.splice(first..first, touched);
        q
    }

    pub(crate) fn pages(&self) -> &[KeyValues] {
        &self.0
    }

    /// As [`Self::append`], for one token, where the device says, into the one page that nobody else holds, and its
    /// attention.
    #[cfg(feature = "gpu")]
    pub(super) fn attend_at(
        &mut self,
        qkv: Tensor<2>,
        place: &ops::Place,
        window: Option<usize>,
    ) -> Tensor<2> {
        ops::attend_at(qkv, &self.0[0], place, window)
    }

    /// The page that holds these positions, and where. Pages are of [`PAGE`] positions, or there is one.
    fn place(&self, at: Range<usize>) -> (usize, Range<usize>) {
        let capacity = self.0[0].capacity();
        let first = at.start / capacity * capacity;
        (first / capacity, at.start - first..at.end - first)
    }
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::ops::codes::Bits;

    #[test]
    fn a_page_of_all_layers_takes_the_memory_that_it_holds() {
        for format in [
            CacheFormat::Floats(DType::F32),
            CacheFormat::Floats(DType::F16),
            CacheFormat::Codes(Bits::Eight),
            CacheFormat::Codes(Bits::Four),
        ] {
            for head_dim in [32, 80, 128] {
                let device = Device::flex();
                let shape = CacheShape {
                    num_hidden_layers: 3,
                    num_key_value_heads: 2,
                    head_dim,
                    format,
                    lease: Lease::of(&device),
                    device,
                };
                let mut arena = Arena::of_chunks(shape.bytes(PAGE) as usize);
                for _ in 0..shape.num_hidden_layers {
                    let page = shape.zeros(PAGE, Some(&mut arena));
                    assert_eq!(page.capacity(), PAGE);
                }
                assert_eq!(arena.room(), 0, "{format:?} {head_dim}");
            }
        }
    }
}
