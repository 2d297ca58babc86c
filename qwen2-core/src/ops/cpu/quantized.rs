//! `x Wᵀ + b` over packed weights: activations become eight bits, products are summed as integers.

use std::cell::Cell;
use std::ops::Range;

use super::activations::{self, Activations, SPAN};
use super::cut::Cut;
use super::packed_tile::{
    LONG, PANELS, SPAN_PAIRS, STREAMS, TOKENS, Tile, favours_eight_bits, streams,
};
use super::pool;
use super::product::{self, Product, Sums, Target};
use super::simd::{Isa, Simd, per_isa};
use crate::ops::packed::{Format, ROWS, Shape};

/// From so many tokens on the arithmetic is the work, not the weights.
pub(crate) const MANY: usize = 16;
/// From so many tokens on weights of four bits are brought to eight before, where that helps.
const WIDEN: usize = 48;
/// Most sums that a task keeps at once: with the weights in the second-level cache.
const SUMS: usize = 32 << 10;
/// Most panels whose sums are kept at once.
const MOST_PANELS: usize = 64;
/// Pairs of blocks that a pass over many tokens takes: of two panels the first-level cache holds as
/// much.
const DEPTH: usize = 2 * SPAN_PAIRS;

/// One multiplication of activations by a packed matrix.
#[derive(Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub(crate) x: &'a Activations,
    pub(crate) shape: Shape,
    pub(crate) bytes: &'a [u8],
}

impl Packed<'_> {
    fn check(&self) {
        assert_eq!(self.bytes.len(), self.shape.bytes(), "packed length");
        assert_eq!(self.x.cols(), self.shape.cols, "activation width");
    }

    /// Adds the products of some tokens with some panels to `sums`, `[tokens][panels · ROWS]`;
    /// `wide`: memory for weights of eight bits.
    fn add_to(
        self,
        isa: Isa,
        panels: Range<usize>,
        tokens: Range<usize>,
        wide: &mut Vec<u8>,
        sums: &mut [f32],
    ) {
        let Self { x, shape, bytes } = self;
        let (stride, all) = (panels.len() * ROWS, shape.blocks() / 2);
        let is_many = x.n >= MANY;
        let depth = if is_many { DEPTH } else { all };
        // A few tokens are a stream: panel by panel, as they lie, each read once for all of them.
        let is_stream = !is_many && (x.n == 1 || matches!(isa, Isa::Avx512Vnni | Isa::Amx));
        let at_once = match is_stream {
            true if x.n == 1 => streams(isa),
            true => 1,
            false => PANELS,
        };
        for pair in (0..all).step_by(depth) {
            let pairs = pair..all.min(pair + depth);
            let mut panel = panels.start;
            while panel < panels.end {
                let n_panels = match (panels.end - panel).min(at_once) {
                    3 => 2, // 1, 2 or 4
                    n => n,
                };
                let at = panel * shape.panel_bytes() + pair * shape.format.pair_bytes();
                let mut tile = Tile {
                    x,
                    tokens: (0, 0),
                    format: shape.format,
                    bytes: &bytes[at..],
                    panel_bytes: shape.panel_bytes(),
                    panels: n_panels,
                    pairs: pairs.clone(),
                    goes_on: panel + n_panels < panels.end,
                };
                let eight = shape.format.wide();
                if x.n >= WIDEN && shape.format != eight && favours_eight_bits(isa) {
                    // Once for all tokens.
                    wide.resize(PANELS * DEPTH * eight.pair_bytes(), 0);
                    tile.panel_bytes = DEPTH * eight.pair_bytes();
                    for (p, wide) in wide
                        .chunks_exact_mut(tile.panel_bytes)
                        .enumerate()
                        .take(n_panels)
                    {
                        let bytes = &tile.bytes[p * shape.panel_bytes()..];
                        let bytes = &bytes[..pairs.len() * shape.format.pair_bytes()];
                        widen(isa, shape.format, bytes, wide);
                    }
                    (tile.format, tile.bytes) = (eight, &wide[..]);
                }
                let mut token = tokens.start;
                while token < tokens.end {
                    let rest = tokens.end - token;
                    let n = match is_stream {
                        true => rest.div_ceil(rest.div_ceil(LONG)),
                        false => 1 << rest.min(TOKENS).ilog2(), // 4, 2 and 1
                    };
                    let first = (token - tokens.start) * stride + (panel - panels.start) * ROWS;
                    tile.tokens = (token, n);
                    tile.multiply(isa, &mut sums[first..], stride);
                    token += n;
                }
                panel += n_panels;
            }
        }
    }
}

per_isa!(widen, widen_kernel, (format: Format, four: &[u8], eight: &mut [u8]));

/// The same weights in eight bits.
///
/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn widen_kernel<S: Simd>(format: Format, four: &[u8], eight: &mut [u8]) {
    let wide = format.wide();
    let (offset, head) = ((wide.offset() - format.offset()) as u8, format.head_bytes());
    let pairs = four.chunks_exact(format.pair_bytes());
    for (four, eight) in pairs.zip(eight.chunks_exact_mut(wide.pair_bytes())) {
        eight[..head].copy_from_slice(&four[..head]);
        let blocks = four[head..].chunks_exact(format.block_bytes());
        for (four, eight) in blocks.zip(eight[head..].chunks_exact_mut(wide.block_bytes())) {
            // Columns 16 apart share a byte.
            let (first, second) = eight.split_at_mut(format.block_bytes());
            for ((four, first), second) in four.iter().zip(first).zip(second) {
                (*first, *second) = ((four & 15) + offset, (four >> 4) + offset);
            }
        }
    }
}

thread_local! {
    /// The sums of a task and its weights in eight bits, kept for the next one. They come back by `with`, since
    /// `LocalKey::set` goes through an initialization, which took 1 % of a token.
    static SCRATCH: Cell<(Vec<f32>, Vec<u8>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

/// [`Packed`] in tasks of some panels each.
pub(crate) struct Panels<'a> {
    isa: Isa,
    args: Packed<'a>,
    target: Target<'a>,
    cut: Cut,
}

impl<'a> Panels<'a> {
    /// `total`: the rows of all the products of the job.
    ///
    /// # Panics
    /// If a length does not fit the shape.
    pub(crate) fn new(isa: Isa, args: Packed<'a>, target: Target<'a>, total: usize) -> Self {
        args.check();
        assert_eq!(args.x.n, target.tokens(), "activation length");
        let (threads, len) = (pool::current_threads(), args.shape.panels());
        // With few tokens the weights are the work. With many, a task's sums are to stay in the second-level
        // cache, and a few tasks are to be there for a thread.
        let cut = match args.x.n {
            0..MANY => Cut::halving(len, args.shape.panel_bytes(), (1, STREAMS), threads),
            _ if total.div_ceil(ROWS) >= 16 * threads => Cut::Even { len, per_task: 4 },
            _ => Cut::Even {
                len,
                per_task: PANELS,
            },
        };
        Self {
            isa,
            args,
            target,
            cut,
        }
    }

    /// Does some panels.
    ///
    /// # Safety
    /// No other thread does one of them meanwhile.
    unsafe fn multiply(&self, panels: Range<usize>) {
        let (n, stride) = (self.args.x.n, panels.len() * ROWS);
        let (mut sums, mut wide) = SCRATCH.take();
        let chunk = (SUMS / stride).max(1);
        for token in (0..n).step_by(chunk) {
            let tokens = token..n.min(token + chunk);
            sums.clear();
            sums.resize(tokens.len() * stride, 0.0);
            let args = self.args;
            args.add_to(
                self.isa,
                panels.clone(),
                tokens.clone(),
                &mut wide,
                &mut sums,
            );
            let first = panels.start * ROWS;
            let values = Sums {
                values: &sums,
                stride,
                tokens: (token, tokens.len()),
                rows: (first, stride.min(args.shape.rows - first)),
            };
            // SAFETY: the lengths were checked; the rest is the caller's promise.
            unsafe { self.target.take(self.isa, values) };
        }
        SCRATCH.with(|scratch| scratch.set((sums, wide)));
    }
}

impl Product for Panels<'_> {
    fn tasks(&self) -> usize {
        self.cut.tasks()
    }

    fn weights(&self, task: usize) -> pool::Streams {
        let (panels, bytes) = (self.cut.lines(task), self.args.shape.panel_bytes());
        pool::streams(
            &self.args.bytes[panels.start * bytes..panels.end * bytes],
            &[],
        )
    }

    fn run(&self, task: usize) {
        let panels = self.cut.lines(task);
        for start in panels.clone().step_by(MOST_PANELS) {
            // SAFETY: the panels are this task's own.
            unsafe { self.multiply(start..panels.end.min(start + MOST_PANELS)) };
        }
    }
}

/// `silu(x gateᵀ) · (x upᵀ)` of many tokens, quantized by the task that made it.
///
/// # Panics
/// If a length does not fit the shapes, or these have not as many rows.
pub(crate) fn swiglu(isa: Isa, gate: Packed<'_>, up: Packed<'_>) -> Activations {
    gate.check();
    up.check();
    assert_eq!(
        (gate.shape.rows, gate.x.n),
        (up.shape.rows, up.x.n),
        "a pair"
    );
    let (rows, panels) = (gate.shape.rows, gate.shape.panels());
    Activations::make(gate.x.n, rows, &|span, tokens, out| {
        let first = span * (SPAN / ROWS);
        let panels = first..panels.min(first + SPAN / ROWS);
        let stride = panels.len() * ROWS;
        let (mut sums, mut wide) = SCRATCH.take();
        sums.clear();
        sums.resize(2 * tokens.len() * stride, 0.0);
        let (gates, ups) = sums.split_at_mut(tokens.len() * stride);
        gate.add_to(isa, panels.clone(), tokens.clone(), &mut wide, gates);
        up.add_to(isa, panels, tokens, &mut wide, ups);
        product::gate(isa, gates, ups);
        activations::quantize(isa, gates, stride, rows - span * SPAN, out);
        SCRATCH.with(|scratch| scratch.set((sums, wide)));
    })
}

/// The products of one token with some panels of a matrix, the others' left out.
///
/// # Panics
/// If a length does not fit the shape, there is no such panel, or one is named twice.
pub(crate) fn some_panels(isa: Isa, args: Packed<'_>, panels: &[usize], target: Target<'_>) {
    const PER_TASK: usize = 8;
    let all = Panels::new(isa, args, target, args.shape.rows);
    let mut seen = vec![false; args.shape.panels()];
    for panel in panels {
        assert!(!std::mem::replace(&mut seen[*panel], true), "named once");
    }
    pool::parallel(panels.len().div_ceil(PER_TASK), &|task| {
        for panel in panels[task * PER_TASK..].iter().take(PER_TASK) {
            // SAFETY: each panel is one task's.
            unsafe { all.multiply(*panel..*panel + 1) };
        }
    });
}

/// The panels with the largest results, at most `most`, in no order. NaN is above all numbers.
pub(crate) fn best_panels(results: &[f32], most: usize) -> Vec<usize> {
    let panels = results.len().div_ceil(ROWS);
    let key = |panel: usize| {
        let results = &results[panel * ROWS..((panel + 1) * ROWS).min(results.len())];
        let ordered = results.iter().map(|x| {
            // Negative numbers are ordered backwards by their bits.
            let bits = x.to_bits() as i32;
            if x.is_nan() {
                i32::MAX
            } else {
                bits ^ (bits >> 31 & i32::MAX)
            }
        });
        ordered.fold(i32::MIN, i32::max)
    };
    let mut best: Vec<_> = (0..panels).map(|panel| (key(panel), panel)).collect();
    if most < best.len() {
        best.select_nth_unstable_by_key(most, |(key, _)| std::cmp::Reverse(*key));
        best.truncate(most);
    }
    best.into_iter().map(|(_, panel)| panel).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::product::{Finish, run_all};
    use super::*;
    use crate::ops::fit::Effort;
    use crate::ops::packed::{BLOCK, Beside, Block};
    use half::f16;

    fn wave(len: usize, f: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * f).sin()).collect()
    }

    pub(in crate::ops::cpu) fn pack(shape: Shape, w: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; shape.bytes()];
        for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
            let row =
                |i: usize, out: &mut [f32]| out.copy_from_slice(&w[i * shape.cols..][..shape.cols]);
            shape.pack_panel(panel, Effort::Search, &row, out);
        }
        bytes
    }

    /// Of any format: blocks of numbers that look like noise.
    pub(in crate::ops::cpu) fn pack_blocks(shape: Shape) -> Vec<u8> {
        let block = |r: usize, b: usize| {
            let noise = |i: usize| (r * 7919 + b * 104_729 + i * 1009) % 251;
            Block {
                scale: f16::from_f32((noise(40) as f32 - 125.0) * 1e-3),
                other: f16::from_f32(match shape.format.beside() {
                    Beside::SecondScales => (noise(41) as f32 - 125.0) * 1e-3,
                    _ => noise(41) as f32 / 12.0 - 3.0,
                }),
                quants: std::array::from_fn(|i| (noise(i) % 16) as i8),
            }
        };
        let mut bytes = vec![0; shape.bytes()];
        for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
            shape.place_panel(panel, &block, out);
        }
        bytes
    }

    fn product(isa: Isa, x: &Activations, shape: Shape, bytes: &[u8], bias: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.n * shape.rows];
        let target = Target::new(
            &mut out,
            shape.rows,
            0..shape.rows,
            Finish::Store,
            Some(bias),
        );
        run_all(&[&Panels::new(
            isa,
            Packed { x, shape, bytes },
            target,
            shape.rows,
        )]);
        out
    }

    /// Both sides as the kernels see them, multiplied in f64.
    fn reference(x: &Activations, shape: Shape, bytes: &[u8], bias: &[f32]) -> Vec<f32> {
        let n = x.n;
        let mut row = vec![0.0; shape.cols];
        let mut out = vec![0.0; n * shape.rows];
        for r in 0..shape.rows {
            shape.unpack_row(bytes, r, &mut row);
            for t in 0..n {
                let sum: f64 = row
                    .iter()
                    .enumerate()
                    .map(|(c, w)| {
                        let at = c / SPAN * n + t;
                        let q = f64::from(x.quants[at * SPAN + c % SPAN]);
                        f64::from(*w) * f64::from(x.scales[at]) * q
                    })
                    .sum();
                out[t * shape.rows + r] = (sum + f64::from(bias[r])) as f32;
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn packed_linear_matches_the_definition_for_odd_shapes(
            n in 1usize..70, rows in 1usize..150, cols in 1usize..700, q8 in any::<bool>(),
        ) {
            let shape = Shape { format: if q8 { Format::Q8 } else { Format::Q4 }, rows, cols };
            let bytes = pack(shape, &wave(rows * cols, 0.37));
            let x = Activations::new(Isa::Portable, &wave(n * cols, 0.73), cols);
            let bias = wave(rows, 0.9);
            let want = reference(&x, shape, &bytes, &bias);
            for isa in Isa::available() {
                let out = product(isa, &x, shape, &bytes, &bias);
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() < 1e-4, "{isa:?} {shape:?}: {out} {want}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        #[test]
        fn blocks_with_more_than_a_scale_match_the_definition(
            n in 1usize..70, rows in 1usize..100, blocks in 1usize..20, format in 0usize..3,
        ) {
            let format = [Format::Q4Zero, Format::Q8Zero, Format::Q8Halves][format];
            let shape = Shape { format, rows, cols: blocks * BLOCK };
            let bytes = pack_blocks(shape);
            let x = Activations::new(Isa::Portable, &wave(n * shape.cols, 0.73), shape.cols);
            let bias = wave(rows, 0.9);
            let want = reference(&x, shape, &bytes, &bias);
            for isa in Isa::available() {
                let out = product(isa, &x, shape, &bytes, &bias);
                for (out, want) in out.iter().zip(&want) {
                    prop_assert!((out - want).abs() < 2e-4, "{isa:?} {shape:?}: {out} {want}");
                }
            }
        }
    }

    #[test]
    fn a_tokens_results_do_not_depend_on_the_others() {
        for (format, cols) in [
            (Format::Q8, 70),
            (Format::Q4, 70),
            (Format::Q8, 704),
            (Format::Q4, 704),
            (Format::Q4Zero, 704),
            (Format::Q8Zero, 704),
            (Format::Q8Halves, 704),
        ] {
            let shape = Shape {
                format,
                rows: 90,
                cols,
            };
            let bytes = match format.is_plain() {
                true => pack(shape, &wave(90 * cols, 0.37)),
                false => pack_blocks(shape),
            };
            let x = wave(61 * cols, 0.73);
            for isa in Isa::available() {
                let of = |x: &[f32]| {
                    product(
                        isa,
                        &Activations::new(isa, x, cols),
                        shape,
                        &bytes,
                        &[0.0; 90],
                    )
                };
                let together = of(&x);
                for n in [1, 2, 3, 7] {
                    let apart: Vec<f32> = x.chunks(n * cols).flat_map(of).collect();
                    assert_eq!(apart, together, "{isa:?} {format:?} {n}");
                }
            }
        }
    }

    #[test]
    fn a_quantized_gate_is_the_gate_quantized() {
        for (format, rows, n) in [(Format::Q8, 300, 17), (Format::Q4, 130, 300)] {
            let shape = Shape {
                format,
                rows,
                cols: 70,
            };
            let (gate, up) = (
                pack(shape, &wave(rows * 70, 0.37)),
                pack(shape, &wave(rows * 70, 0.31)),
            );
            for isa in Isa::available() {
                let x = &Activations::new(isa, &wave(n * 70, 0.73), 70);
                let packed = |bytes| Packed { x, shape, bytes };
                let mut out = vec![f32::NAN; n * rows];
                for (bytes, finish) in [(&gate, Finish::Store), (&up, Finish::Gate)] {
                    let target = Target::new(&mut out, rows, 0..rows, finish, None);
                    run_all(&[&Panels::new(isa, packed(bytes), target, rows)]);
                }
                let want = Activations::new(isa, &out, rows);
                assert_eq!(swiglu(isa, packed(&gate), packed(&up)), want, "{isa:?}");
            }
        }
    }

    #[test]
    fn some_panels_are_those_of_the_whole_product() {
        let shape = Shape {
            format: Format::Q8,
            rows: 90,
            cols: 70,
        };
        let bytes = pack(shape, &wave(90 * 70, 0.37));
        let x = Activations::new(Isa::Portable, &wave(70, 0.73), 70);
        for isa in Isa::available() {
            let whole = product(isa, &x, shape, &bytes, &[0.0; 90]);
            let mut out = [f32::NAN; 90];
            let target = Target::new(&mut out, 90, 0..90, Finish::Store, None);
            let args = Packed {
                x: &x,
                shape,
                bytes: &bytes,
            };
            some_panels(isa, args, &[5, 1], target);
            for (row, (out, whole)) in out.iter().zip(&whole).enumerate() {
                match row / ROWS {
                    1 | 5 => assert_eq!(out, whole, "{isa:?}"),
                    _ => assert!(out.is_nan()),
                }
            }
        }
    }

    #[test]
    fn the_best_panels_have_the_largest_results() {
        let mut results = wave(16 * 20 + 3, 0.01);
        results.iter_mut().for_each(|x| *x -= 3.0);
        (results[40], results[16 * 20 + 1], results[100]) = (5.0, 4.0, -0.5);
        let mut best = best_panels(&results, 3);
        best.sort_unstable();
        assert_eq!(best, [2, 6, 20]);
        results[0] = f32::NAN;
        assert_eq!(best_panels(&results, 1), [0]);
        assert_eq!(best_panels(&results, 99).len(), 21);
    }

    #[test]
    fn extreme_activations_do_not_saturate() {
        let shape = Shape {
            format: Format::Q8,
            rows: 16,
            cols: 64,
        };
        let w: Vec<f32> = (0..16 * 64)
            .map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })
            .collect();
        let bytes = pack(shape, &w);
        let x = Activations::new(Isa::Portable, &w[..64], 64);
        for isa in Isa::available() {
            let out = product(isa, &x, shape, &bytes, &[0.0; 16]);
            assert!(
                out.iter().all(|out| (out - 64.0).abs() < 0.1),
                "{isa:?} {out:?}"
            );
        }
    }

    #[test]
    fn a_nan_reaches_the_output() {
        let shape = Shape {
            format: Format::Q4,
            rows: 2,
            cols: 32,
        };
        let bytes = pack(shape, &[0.5; 64]);
        let mut x = vec![1.0; 32];
        x[3] = f32::NAN;
        for isa in Isa::available() {
            let x = Activations::new(Isa::Portable, &x, 32);
            let out = product(isa, &x, shape, &bytes, &[0.0; 2]);
            assert!(out.iter().all(|out| out.is_nan()), "{isa:?}");
        }
    }
}
