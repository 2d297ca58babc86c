//! Products of one set of activations with several matrices as one job of the pool, and what becomes
//! of their sums.

use std::mem::MaybeUninit;

use super::pool;
use super::simd::{Isa, Simd, exp, per_isa};

/// A product with one matrix, cut into tasks that know where their results go.
pub(crate) trait Product: Sync {
    /// How many tasks it is.
    fn tasks(&self) -> usize;
    /// The weights that one of them reads.
    fn weights(&self, task: usize) -> pool::Streams;
    /// Does one of them.
    fn run(&self, task: usize);
}

impl Product for Box<dyn Product + '_> {
    fn tasks(&self) -> usize {
        (**self).tasks()
    }

    fn weights(&self, task: usize) -> pool::Streams {
        (**self).weights(task)
    }

    fn run(&self, task: usize) {
        (**self).run(task);
    }
}

/// Does all tasks of all products on the threads of the current pool.
pub(crate) fn run_all(products: &[&dyn Product]) {
    let find = |mut task: usize| {
        for product in products {
            match task.checked_sub(product.tasks()) {
                None => return (*product, task),
                Some(left) => task = left,
            }
        }
        unreachable!("tasks are numbered below their sum")
    };
    pool::parallel_streams(
        products.iter().map(|product| product.tasks()).sum(),
        &|task| {
            let (product, task) = find(task);
            product.weights(task)
        },
        &|task| {
            let (product, task) = find(task);
            product.run(task);
        },
    );
}

/// Two products over equal shapes whose sums meet: each task does its share of both, so that the
/// first one's results are at hand when the second one's come.
pub(crate) struct Pair<A, B>(pub(crate) A, pub(crate) B);

impl<A: Product, B: Product> Product for Pair<A, B> {
    fn tasks(&self) -> usize {
        debug_assert_eq!(self.0.tasks(), self.1.tasks(), "equal shapes");
        self.0.tasks()
    }

    fn weights(&self, task: usize) -> pool::Streams {
        [self.0.weights(task)[0], self.1.weights(task)[0]]
    }

    fn run(&self, task: usize) {
        self.0.run(task);
        self.1.run(task);
    }
}

/// What becomes of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// It is stored.
    Store,
    /// It is added to what is there: a residual.
    Add,
    /// It is multiplied with the SiLU of what is there: a gate.
    Gate,
}

/// The place of a product's results: the columns from `first` on of `out`, `[n, stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    out: *mut f32,
    len: usize,
    stride: usize,
    first: usize,
    finish: Finish,
    bias: Option<&'a [f32]>,
}

// SAFETY: tasks write through it to rows of their own only, by the contract of `Target::take`.
unsafe impl Sync for Target<'_> {}
// SAFETY: as above.
unsafe impl Send for Target<'_> {}

/// Sums of `tokens` × `rows`, `[tokens, stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Sums<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
    /// First token and their number.
    pub(crate) tokens: (usize, usize),
    /// First row of the matrix and their number.
    pub(crate) rows: (usize, usize),
}

impl<'a> Target<'a> {
    /// `rows` columns of `out` from `first` on, with the bias of those rows.
    ///
    /// # Panics
    /// If they are not inside a row of `out`, or the bias has another length.
    pub(crate) fn new(
        out: &mut [f32],
        stride: usize,
        columns: std::ops::Range<usize>,
        finish: Finish,
        bias: Option<&'a [f32]>,
    ) -> Self {
        // Numbers stay numbers: only they are written.
        let out = (out.as_mut_ptr(), out.len());
        Self::over(out, stride, columns, finish, bias)
    }

    /// As [`Self::new`], for numbers that are stored where there are none yet.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub(crate) fn unset(
        out: &mut [MaybeUninit<f32>],
        stride: usize,
        columns: std::ops::Range<usize>,
        bias: Option<&'a [f32]>,
    ) -> Self {
        let out = (out.as_mut_ptr().cast(), out.len());
        Self::over(out, stride, columns, Finish::Store, bias)
    }

    fn over(
        (out, len): (*mut f32, usize),
        stride: usize,
        columns: std::ops::Range<usize>,
        finish: Finish,
        bias: Option<&'a [f32]>,
    ) -> Self {
        assert!(
            columns.end <= stride && len.is_multiple_of(stride),
            "output shape"
        );
        assert!(
            bias.is_none_or(|bias| bias.len() == columns.len()),
            "bias length"
        );
        Self {
            out,
            len,
            stride,
            first: columns.start,
            finish,
            bias,
        }
    }

    /// Tokens that there is room for.
    pub(crate) fn tokens(&self) -> usize {
        self.len / self.stride
    }

    /// Brings sums home.
    ///
    /// # Safety
    /// Tokens and rows are inside the product's shape, and no other task has these rows.
    pub(crate) unsafe fn take(&self, isa: Isa, sums: Sums<'_>) {
        let (token, tokens) = sums.tokens;
        let (row, rows) = sums.rows;
        let first = token * self.stride + self.first + row;
        let last = first + (tokens - 1) * self.stride + rows;
        assert!(last <= self.len, "inside the output");
        assert!(
            (tokens - 1) * sums.stride + rows <= sums.values.len(),
            "inside the sums"
        );
        let bias = self.bias.map(|bias| &bias[row..][..rows]);
        // SAFETY: as just checked; that nobody else writes there is the caller's promise.
        finish(
            isa,
            self.finish,
            sums,
            bias,
            unsafe { self.out.add(first) },
            self.stride,
        );
    }
}

per_isa!(pub(super) gate, gate_kernel, (gates: &mut [f32], ups: &[f32]));

/// `gates` become `silu(gates) · ups`.
///
/// # Safety
/// The instruction set of `S` is present.
#[inline(always)]
unsafe fn gate_kernel<S: Simd>(gates: &mut [f32], ups: &[f32]) {
    for (gate, up) in gates.iter_mut().zip(ups) {
        *gate = gated(*gate, *up);
    }
}

#[inline(always)]
fn gated(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(-gate)) * up
}

per_isa!(finish, finish_kernel, (
    how: Finish, sums: Sums<'_>, bias: Option<&[f32]>, out: *mut f32, stride: usize,
));

/// # Safety
/// The instruction set of `S` is present; tokens and rows are inside `sums` and `out`, whose rows are
/// `stride` apart and hold numbers, unless those are only stored.
#[inline(always)]
unsafe fn finish_kernel<S: Simd>(
    how: Finish,
    sums: Sums<'_>,
    bias: Option<&[f32]>,
    out: *mut f32,
    stride: usize,
) {
    let rows = sums.rows.1;
    for i in 0..sums.tokens.1 {
        let values = &sums.values[i * sums.stride..][..rows];
        // SAFETY: the caller's promise.
        let out: &mut [MaybeUninit<f32>] =
            unsafe { std::slice::from_raw_parts_mut(out.add(i * stride).cast(), rows) };
        let write = |out: &mut MaybeUninit<f32>, sum: f32| {
            // SAFETY: as above.
            let before = |out: &MaybeUninit<f32>| unsafe { out.assume_init() };
            out.write(match how {
                Finish::Store => sum,
                Finish::Add => before(out) + sum,
                Finish::Gate => gated(before(out), sum),
            });
        };
        match bias {
            None => out
                .iter_mut()
                .zip(values)
                .for_each(|(out, sum)| write(out, *sum)),
            Some(bias) => {
                let sums = values.iter().zip(bias).map(|(sum, bias)| sum + bias);
                out.iter_mut()
                    .zip(sums)
                    .for_each(|(out, sum)| write(out, sum));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums 1, 2, 3… to every token; one row a task.
    struct Count<'a>(Target<'a>, usize);

    impl Product for Count<'_> {
        fn tasks(&self) -> usize {
            self.1
        }
        fn weights(&self, _: usize) -> pool::Streams {
            pool::streams::<u8>(&[], &[])
        }
        fn run(&self, task: usize) {
            for token in 0..self.0.tokens() {
                let values = &[(task + 1) as f32];
                let sums = Sums {
                    values,
                    stride: 1,
                    tokens: (token, 1),
                    rows: (task, 1),
                };
                // SAFETY: every task has its own row.
                unsafe { self.0.take(Isa::selected(), sums) };
            }
        }
    }

    #[test]
    fn products_share_an_output_side_by_side() {
        let mut out = vec![0.5; 10];
        let bias = [10.0, 20.0, 30.0];
        let a = Count(Target::new(&mut out, 5, 0..2, Finish::Store, None), 2);
        let b = Count(Target::new(&mut out, 5, 2..5, Finish::Add, Some(&bias)), 3);
        run_all(&[&a, &b]);
        assert_eq!(out, [1.0, 2.0, 11.5, 22.5, 33.5].repeat(2));
    }

    #[test]
    fn a_gate_is_the_silu_of_what_is_there() {
        for isa in Isa::available() {
            let gates = [1e30, -1e30, f32::INFINITY, f32::NAN, -0.0, 1.25, -3.0];
            let mut out = gates;
            let target = Target::new(&mut out, 7, 0..7, Finish::Gate, None);
            let sums = Sums {
                values: &[2.0; 7],
                stride: 7,
                tokens: (0, 1),
                rows: (0, 7),
            };
            // SAFETY: one task.
            unsafe { target.take(isa, sums) };
            assert_eq!(out[0], 2e30);
            assert!(out[1].abs() < 1e-3);
            assert_eq!(out[2], f32::INFINITY);
            assert!(out[3].is_nan());
            assert_eq!(out[4], 0.0);
            for i in 5..7 {
                let gate = f64::from(gates[i]);
                assert!((f64::from(out[i]) - 2.0 * gate / (1.0 + (-gate).exp())).abs() < 1e-6);
            }
        }
    }
}
