//! A decode step that is recorded once and launched as a whole from then on: CUDA's graphs, and what wgpu has in
//! their place.

use std::thread::{self, ThreadId};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_cubecl::cubecl::client::Graph;
use burn_cubecl::cubecl::future::block_on;
use burn_cubecl::cubecl::prelude::*;

use super::choice::{self, MOST_LIKELY};
use super::cube::{cube, empty, integers};
use super::reduce::UNITS;
use crate::fence::fenced;
use crate::ops::Place;

/// Shares of a row of logits, each with a cube to itself.
const MOST_SHARES: usize = UNITS;

/// Launches on one stream of a device, to be repeated over the same buffers.
#[derive(Debug)]
pub(crate) struct Recording {
    graph: Graph,
    /// cubecl gives each thread a stream.
    thread: ThreadId,
}

impl Recording {
    /// Records what `body` launches, which must neither read from the device nor write to it by other means than
    /// its kernels: once for real, so that kernels are compiled and memory is found, then once more as the recording.
    /// `look` takes what it needs of the first result, whose memory the second has again. Nothing where the device
    /// records nothing or `body` fails.
    pub(crate) fn of<R, S>(
        device: &Device,
        look: impl FnOnce(R) -> S,
        mut body: impl FnMut() -> R,
    ) -> Option<(Self, S, R)> {
        let client = cube(Tensor::<1>::zeros([1], device)).client;
        client.graph_prepare().ok()?;
        let recorded = fenced(|| {
            let first = look(body());
            block_on(client.sync()).ok()?;
            client.start_capture().ok()?;
            Some((first, body()))
        });
        // A capture that failed on the way ends as well.
        let graph = client.stop_capture();
        match (recorded, graph) {
            (Ok(Some((first, out))), Ok(graph)) => {
                let thread = thread::current().id();
                Some((Self { graph, thread }, first, out))
            }
            (recorded, graph) => {
                let failed = recorded.err().unwrap_or_default();
                let refused = graph.err();
                tracing::debug!(?failed, ?refused, "nothing was recorded");
                None
            }
        }
    }

    /// Whether this thread's launches and reads go in order with the recording's.
    pub(crate) fn is_in_order(&self) -> bool {
        thread::current().id() == self.thread
    }

    /// Launches all of it. What it reads and writes is what was there when it was recorded: the caller keeps that.
    ///
    /// # Panics
    /// On a thread that is not in order, and where the device refuses it, as burn reports.
    pub(crate) fn replay(&self) {
        assert!(
            self.is_in_order(),
            "a recording is replayed where it was made"
        );
        // SAFETY: cubecl guards every page that a recording touched for as long as the graph lives, so its memory is
        // there and nobody else's; launches and reads of this thread, the only one, are on its stream, in order.
        let launched = unsafe { self.graph.replay() };
        launched.unwrap_or_else(|error| panic!("replay: {error:?}"));
    }
}

/// Bytes that the process has of the device's memory.
#[cfg(test)]
pub(crate) fn reserved(device: &Device) -> u64 {
    use burn_cubecl::cubecl::MemoryScope;
    let client = cube(Tensor::<1>::zeros([1], device)).client;
    client
        .memory_report(MemoryScope::Device)
        .usage()
        .bytes_reserved
}

/// Buffers of a token and its place.
pub(crate) fn place(device: &Device) -> [Tensor<1, Int>; 2] {
    [(); 2].map(|()| {
        let zero = TensorData::new(vec![0_i32], [1]);
        Tensor::from_data(zero, (device, DType::I32))
    })
}

/// The token behind `n_past` positions, written where kernels that run from now on find it.
pub(crate) fn set(place: &Place, token: u32, n_past: usize) {
    let [token_buffer, at] = [&place.token, &place.n_past].map(|tensor| cube(tensor.clone()));
    let client = token_buffer.client.clone();
    // SAFETY: one unit writes the one element of each.
    unsafe {
        choice::set::launch_unchecked(
            &client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(1),
            token_buffer.into_buffer_arg(),
            at.into_buffer_arg(),
            token,
            n_past as u32,
        );
    }
}

/// What a step finds in its row of logits.
#[derive(Clone, Debug)]
pub(crate) struct Best {
    /// `[1]`: the place of the highest logit, -1 where there is none.
    pub(crate) found: Tensor<1, Int>,
    /// The keys of the highest of each share.
    keys: Tensor<1, Int>,
    likely: Tensor<1, Int>,
}

/// How many logits a cube looks at, and how many cubes that makes.
fn shares(n: usize) -> [usize; 2] {
    let share = n.div_ceil(MOST_SHARES).next_multiple_of(32);
    [share, n.div_ceil(share)]
}

/// The place of the highest logit of a row `[1, vocab_size]`, which becomes the token of the next place.
pub(crate) fn best(logits: &Tensor<2>, place: &Place) -> Best {
    let [_, n] = logits.dims();
    let logits = cube(logits.clone());
    let client = logits.client.clone();
    let [share, shares] = shares(n);
    let keys = empty(&logits, [shares], DType::I32);
    let places = empty(&logits, [shares], DType::I32);
    let found = empty(&logits, [1], DType::I32);
    let likely = empty(&logits, [1 + 2 * MOST_LIKELY], DType::I32);
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: a cube reads its share of the row, below `n`, and writes its element of both; then one cube reads
    // these `shares`, at most as many as it has units, and writes the first element of each of the others.
    unsafe {
        choice::best_of_shares::launch_unchecked(
            &client,
            CubeCount::Static(shares as u32, 1, 1),
            dim,
            logits.into_buffer_arg(),
            keys.clone().into_buffer_arg(),
            places.clone().into_buffer_arg(),
            n as u32,
            share as u32,
        );
        choice::best_of_all::launch_unchecked(
            &client,
            CubeCount::Static(1, 1, 1),
            dim,
            keys.clone().into_buffer_arg(),
            places.into_buffer_arg(),
            found.clone().into_buffer_arg(),
            likely.clone().into_buffer_arg(),
            cube(place.token.clone()).into_buffer_arg(),
            cube(place.n_past.clone()).into_buffer_arg(),
            shares as u32,
        );
    }
    let [found, keys, likely] = [found, keys, likely].map(integers);
    Best {
        found,
        keys,
        likely,
    }
}

/// The likeliest tokens of the row that `best` was found in, once for each time that it was found:
/// for [`read_likeliest`].
pub(crate) fn likeliest(logits: &Tensor<2>, best: &Best) -> Tensor<1, Int> {
    let [_, n] = logits.dims();
    let logits = cube(logits.clone());
    let client = logits.client.clone();
    let [share, shares] = shares(n);
    // SAFETY: a cube reads the keys of all `shares`, at most as many as it has units, and its share of the row, below
    // `n`; it writes to places of `likely` that nobody else has, below its length.
    unsafe {
        choice::gather::launch_unchecked(
            &client,
            CubeCount::Static(shares as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            logits.into_buffer_arg(),
            cube(best.keys.clone()).into_buffer_arg(),
            cube(best.likely.clone()).into_buffer_arg(),
            n as u32,
            share as u32,
        );
    }
    best.likely.clone()
}

/// Tokens and their logits in the order of the tokens, of which every other one has a lower logit; nothing where they are
/// too many, or the row has no highest.
pub(crate) fn read_likeliest(likely: &[i32]) -> Option<Vec<(u32, f32)>> {
    let (count, pairs) = likely.split_first()?;
    let (pairs, _) = pairs.as_chunks::<2>();
    let pairs = pairs.get(..usize::try_from(*count).ok()?)?;
    let unpacked = |[token, bits]: &[i32; 2]| (*token as u32, f32::from_bits(*bits as u32));
    let mut found: Vec<_> = pairs.iter().map(unpacked).collect();
    found.sort_unstable_by_key(|(token, _)| *token);
    Some(found)
}
