//! A mixture of experts: each expert multiplies the tokens that were sent to it, all of them in two jobs.

use std::borrow::Cow;

use burn_flex::{Flex, FlexTensor};

use super::matrix::{Gated, Input, Matrix};
use super::product::{Finish, Target, run_all};
use super::{dims, elementwise, normed};
use crate::ops::Route;

/// As `ops::experts`; three matrices a route: gate, up and down.
pub(super) fn flex_experts(
    h: FlexTensor,
    norm: &FlexTensor,
    eps: f64,
    matrices: &[Matrix<Flex>],
    routes: &[Route],
) -> FlexTensor {
    let mut h = h.to_contiguous();
    let [n, hidden] = dims(&h);
    let x = normed(&h, norm, eps);
    let experts = matrices.as_chunks::<3>().0;
    let gated = gated(&x, (n, hidden), experts, routes);
    let downs = downs(hidden, experts, &gated);
    // The sum goes expert by expert, in the same order whatever the threads do.
    let out = &mut h.storage_mut::<f32>()[..n * hidden];
    let mut places = vec![Vec::new(); n];
    for (visit, route) in routes.iter().enumerate() {
        for (row, (token, weight)) in route.tokens.iter().zip(&route.weights).enumerate() {
            places[*token as usize].push((visit, row, *weight));
        }
    }
    elementwise::by_row(out, hidden, &|token, out| {
        for &(visit, row, weight) in &places[token] {
            let down = &downs[visit][row * hidden..][..hidden];
            for (out, down) in out.iter_mut().zip(down) {
                *out += weight * down;
            }
        }
    });
    h
}

/// `silu(gate(x)) · up(x)` of every route's tokens, `[tokens, moe_intermediate_size]` each.
fn gated(
    x: &[f32],
    (n, hidden): (usize, usize),
    experts: &[[Matrix<Flex>; 3]],
    routes: &[Route],
) -> Vec<Vec<f32>> {
    let rows: Vec<Cow<'_, [f32]>> = routes
        .iter()
        .map(|route| match route.tokens.len() == n {
            true => Cow::Borrowed(x), // every token once, in order
            false => Cow::Owned(gather(x, hidden, &route.tokens)),
        })
        .collect();
    let all: Vec<_> = experts
        .iter()
        .flat_map(|[gate, up, _]| [gate, up])
        .collect();
    // What visits all tokens shares one form of them; so does every expert of a single token.
    let whole = Input::new(x, hidden, &all);
    let own: Vec<_> = rows
        .iter()
        .zip(experts)
        .map(|(rows, [gate, up, _])| match rows {
            Cow::Borrowed(_) => None,
            Cow::Owned(rows) => Some(Input::new(rows, hidden, &[gate, up])),
        })
        .collect();
    let mut out: Vec<_> = routes
        .iter()
        .zip(experts)
        .map(|(route, [gate, ..])| vec![0.0; route.tokens.len() * gate.rows()])
        .collect();
    let products = out
        .iter_mut()
        .zip(experts)
        .zip(&own)
        .map(|((out, [gate, up, _]), own)| {
            let input = own.as_ref().unwrap_or(&whole);
            // Cut as if each were alone: of unequal matrices one would else be a task too long.
            Gated::new((gate, up), input, out, 2 * gate.rows())
        });
    // The one that all tokens visit comes last, and is to begin first: it is the largest.
    Gated::run_all(products.rev().collect());
    out
}

/// The last product of every route, `[tokens, hidden]` each.
fn downs(hidden: usize, experts: &[[Matrix<Flex>; 3]], gated: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let inputs: Vec<_> = gated
        .iter()
        .zip(experts)
        .map(|(x, [gate, _, down])| Input::new(x, gate.rows(), &[down]))
        .collect();
    let mut out: Vec<_> = inputs
        .iter()
        .map(|input| vec![0.0; input.n() * hidden])
        .collect();
    let products: Vec<_> = out
        .iter_mut()
        .zip(experts)
        .zip(&inputs)
        .map(|((out, [.., down]), input)| {
            let target = Target::new(out, hidden, 0..hidden, Finish::Store, None);
            down.product(input, target, hidden)
        })
        .collect();
    run_all(
        &products
            .iter()
            .rev()
            .map(|product| &**product)
            .collect::<Vec<_>>(),
    );
    drop(products);
    out
}

fn gather(x: &[f32], width: usize, rows: &[u32]) -> Vec<f32> {
    let rows = rows.iter().map(|row| *row as usize);
    rows.flat_map(|row| &x[row * width..][..width])
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Int, Tensor, TensorData, activation};

    use crate::ops::fit::Effort;
    use crate::ops::packed::{Format, Shape};
    use crate::ops::{Linear, RmsNorm, Route, Visit, Weight, cpu, portable};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        let number = |i: usize| ((i + seed * 31) * 7919 % 2003) as f32 / 1001.5 - 1.0;
        (0..n).map(number).collect()
    }

    /// A matrix in f32, or packed.
    fn linear(format: Option<Format>, rows: usize, cols: usize, seed: usize) -> Linear {
        let device = Device::flex();
        let w = numbers(rows * cols, seed);
        let weight = match format {
            None => Weight::Dense(Tensor::from_data(TensorData::new(w, [rows, cols]), &device)),
            Some(format) => {
                let shape = Shape { format, rows, cols };
                let mut bytes = vec![0_u8; shape.bytes()];
                for (panel, out) in bytes.chunks_mut(shape.panel_bytes()).enumerate() {
                    let row = |i: usize, out: &mut [f32]| {
                        out.copy_from_slice(&w[i * cols..][..cols]);
                    };
                    shape.pack_panel(panel, Effort::Search, &row, out);
                }
                let data = TensorData::new(bytes, [shape.bytes()]);
                let bytes = Tensor::<1, Int>::from_data(data, (&device, burn::tensor::DType::U8));
                Weight::Packed { shape, bytes }
            }
        };
        Linear {
            weight,
            bias: None,
            adapters: Vec::new(),
        }
    }

    fn route(tokens: Vec<u32>) -> Route {
        let weights = tokens
            .iter()
            .map(|token| 0.3 + 0.1 * *token as f32)
            .collect();
        Route { tokens, weights }
    }

    /// As activations are rounded for packed matrices: 128 share a scale.
    fn rounded(x: Tensor<2>) -> Tensor<2> {
        let [n, width] = x.dims();
        let mut values: Vec<f32> = x.into_data().iter::<f32>().collect();
        for span in values.chunks_mut(width).flat_map(|row| row.chunks_mut(128)) {
            let step = span.iter().fold(0.0, |max: f32, x| max.max(x.abs())) / 127.0;
            for x in span {
                *x = (*x / step).round_ties_even() * step;
            }
        }
        Tensor::from_data(TensorData::new(values, [n, width]), &Device::flex())
    }

    fn product(x: Tensor<2>, matrix: &Linear) -> Tensor<2> {
        let zero = Tensor::zeros([x.dims()[0], matrix.out_features()], &x.device());
        let x = match matrix.weight {
            Weight::Dense(_) => x,
            Weight::Packed { .. } => rounded(x),
        };
        portable::add_project(zero, x, matrix)
    }

    /// The definition, expert by expert.
    fn reference(h: Tensor<2>, norm: &RmsNorm, visits: Vec<Visit<'_>>) -> Tensor<2> {
        let x = portable::rms_norm(h.clone(), norm);
        let [_, hidden] = h.dims();
        visits.into_iter().fold(h, |h, visit| {
            let seen = visit.route.tokens.iter().zip(&visit.route.weights);
            seen.fold(h, |h, (token, weight)| {
                let token = *token as usize;
                let x = x.clone().narrow(0, token, 1);
                let gate = activation::silu(product(x.clone(), visit.gate));
                let y = product(gate * product(x, visit.up), visit.down);
                let place = [token..token + 1, 0..hidden];
                let sum = h.clone().slice(place.clone()) + y * *weight;
                h.slice_assign(place, sum)
            })
        })
    }

    #[test]
    fn experts_equal_their_definition() {
        let hidden = 70;
        let norm = RmsNorm {
            weight: Tensor::from_data(
                TensorData::new(numbers(hidden, 3), [hidden]),
                &Device::flex(),
            ),
            eps: 1e-6,
        };
        // Formats, and how far off a result may be, of the largest one. Against packed matrices the
        // reference rounds activations as the kernels do; where a sum falls on the edge between two
        // steps, one step in 127 of the largest may differ.
        let (q8, q4) = (Some(Format::Q8), Some(Format::Q4));
        for (gates, format, bound) in [
            (None, None, 1e-5),
            (q8, q8, 0.005),
            (q4, q4, 0.005),
            (None, q8, 0.005),
            (q8, q4, 0.005),
        ] {
            let experts: Vec<_> = [(33, 1), (33, 2), (48, 9)]
                .into_iter()
                .map(|(width, seed)| {
                    [
                        linear(gates, width, hidden, seed),
                        linear(format, width, hidden, seed + 20),
                        linear(format, hidden, width, seed + 40),
                    ]
                })
                .collect();
            for n in [1_u32, 3, 40] {
                // One expert sees some tokens, one the last only, one sees all.
                let routes = [(0..n).step_by(2).collect(), vec![n - 1], (0..n).collect()];
                let visits = || {
                    let pairs = experts.iter().zip(&routes);
                    pairs
                        .map(|([gate, up, down], tokens)| Visit {
                            gate,
                            up,
                            down,
                            route: route(tokens.clone()),
                        })
                        .collect::<Vec<_>>()
                };
                let n = n as usize;
                let h = TensorData::new(numbers(n * hidden, 7), [n, hidden]);
                let h = Tensor::<2>::from_data(h, &Device::flex());
                let got = cpu::experts(h.clone(), &norm, visits()).into_data();
                let want = reference(h, &norm, visits()).into_data();
                let size = want.iter::<f32>().fold(0.0, |max: f32, x| max.max(x.abs()));
                assert!(size > 3.0, "{size} proves nothing");
                for (got, want) in got.iter::<f32>().zip(want.iter::<f32>()) {
                    assert!(
                        (got - want).abs() <= bound * size,
                        "{format:?} {n}: {got} {want} of {size}"
                    );
                }
            }
        }
    }
}
