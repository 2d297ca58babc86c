//! Attention beside its definition in f64, over every layout of the cache.

use half::{bf16, f16};
use proptest::prelude::*;

use super::super::layout::{Coded, CodedMut, Codes, CodesWriter, Floats, FloatsWriter, Writer};
use super::super::simd::Stored;
use super::*;
use crate::ops::codes::{self, Bits, padded};

/// One attention in plain order: keys and values `[kv_heads, n_past + n, head_dim]`.
struct Case {
    /// `[rotations, n, heads, head_dim]`.
    q: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    visible: Visible,
    rounds: bool,
}

impl Case {
    fn new(n: usize, visible: Visible, (kv_heads, group): (usize, usize), d: usize) -> Self {
        let wave = |len: usize, f: f32| (0..len).map(|i| (i as f32 * f).sin()).collect();
        let len = kv_heads * (visible.n_past + n) * d;
        Self {
            q: wave(visible.rotations() * n * kv_heads * group * d, 0.731),
            keys: wave(len, 0.377),
            values: wave(len, 0.913),
            heads: kv_heads * group,
            kv_heads,
            head_dim: d,
            visible,
            rounds: false,
        }
    }

    fn length(&self) -> usize {
        self.keys.len() / self.kv_heads / self.head_dim
    }

    fn dims(&self, spare: usize) -> Dims {
        Dims {
            kv_heads: self.kv_heads,
            capacity: (self.length().div_ceil(BLOCK) + spare) * BLOCK,
            head_dim: self.head_dim,
        }
    }

    /// The definition in f64, over keys and values as the cache rounds them.
    fn reference(&self, keys: &[f32], values: &[f32]) -> Vec<f32> {
        let (d, heads, length) = (self.head_dim, self.heads, self.length());
        let mut out = vec![0.0; self.q.len() / self.visible.rotations()];
        let rotation_len = out.len();
        for (row, out) in out.chunks_mut(d).enumerate() {
            let (i, head) = (row / heads, row % heads);
            let kv = head / (heads / self.kv_heads) * length;
            let position = self.visible.n_past + i;
            let seen: Vec<usize> = (self.visible.first(position)..=position).collect();
            let dot = |j: usize| -> f64 {
                let rotation = self.visible.distance(position, j) as usize;
                let q = &self.q[rotation * rotation_len + row * d..][..d];
                let products = q.iter().zip(&keys[(kv + j) * d..][..d]);
                products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum()
            };
            let weights: Vec<f64> = seen
                .iter()
                .map(|&j| (dot(j) / (d as f64).sqrt()).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            for (k, out) in out.iter_mut().enumerate() {
                let weighted = seen.iter().zip(&weights);
                let sum: f64 = weighted
                    .map(|(j, w)| w * f64::from(values[(kv + j) * d + k]))
                    .sum();
                *out = (sum / total) as f32;
            }
        }
        out
    }

    fn write(&self, heads: Vec<impl Writer>) {
        let (d, length) = (self.head_dim, self.length());
        for (head, mut cache) in heads.into_iter().enumerate() {
            for position in 0..length {
                let row = (head * length + position) * d;
                cache.key(position, &self.keys[row..][..d]);
                cache.value(position, &self.values[row..][..d]);
            }
        }
    }

    fn attend<L: Layout>(&self, isa: Isa, pages: &[L]) -> Vec<f32> {
        let args = Attention {
            q: &self.q,
            pages,
            heads: self.heads,
            visible: self.visible,
            rounds: self.rounds,
        };
        let n = self.q.len() / self.visible.rotations();
        let mut out = vec![MaybeUninit::new(f32::NAN); n];
        attention(isa, args, &mut out);
        // SAFETY: they were numbers before.
        out.iter().map(|x| unsafe { x.assume_init() }).collect()
    }

    /// The kernel's result, in a cache with `spare` blocks; what is not written is NaN.
    fn run<W: Stored>(&self, isa: Isa, spare: usize) -> Vec<f32> {
        let dims = self.dims(spare);
        let head = dims.capacity * self.head_dim;
        let mut keys = vec![W::from_f32(f32::NAN); self.kv_heads * head];
        let mut values = keys.clone();
        let heads = keys.chunks_mut(head).zip(values.chunks_mut(head));
        self.write(
            heads
                .map(|(keys, values)| FloatsWriter {
                    head_dim: self.head_dim,
                    keys,
                    values,
                })
                .collect(),
        );
        let (keys, values) = (&keys, &values);
        self.attend(isa, &[Floats { dims, keys, values }])
    }

    fn check<W: Stored>(&self, spare: usize) {
        let round =
            |x: &Vec<f32>| -> Vec<f32> { x.iter().map(|x| W::from_f32(*x).to_f32()).collect() };
        let isas = self.kernels();
        if isas.is_empty() {
            return; // nothing to test: the dispatch never comes here
        }
        let want = self.reference(&round(&self.keys), &round(&self.values));
        for isa in isas {
            for (out, want) in self.run::<W>(isa, spare).iter().zip(&want) {
                let off = (out - want).abs();
                assert!(off < self.most(1e-5), "{isa:?}: {out} {want}");
            }
        }
    }

    /// Those with a kernel of their own for the case.
    fn kernels(&self) -> Vec<Isa> {
        let mut isas = Isa::available();
        isas.retain(|isa| !self.rounds || *isa == Isa::Amx);
        isas
    }

    /// How far a result may be off: where products round, numbers of size 1 have eight bits.
    fn most(&self, exact: f32) -> f32 {
        match self.rounds {
            true => 1.0 / 128.0,
            false => exact,
        }
    }

    /// As [`Self::run`] in a cache of codes; what is not written has NaN for a scale.
    fn check_codes<const BITS: usize>(&self, bits: Bits, spare: usize) {
        if self.kernels().is_empty() {
            return; // as above
        }
        let dims = self.dims(spare);
        let width = padded(self.head_dim);
        let rows = self.kv_heads * dims.capacity;
        let buffers = || {
            (
                vec![0x55; rows * width * BITS / 8],
                vec![bf16::NAN; rows * width / GROUP],
            )
        };
        let ((mut kc, mut ks), (mut vc, mut vs)) = (buffers(), buffers());
        let (codes, scales) = (kc.len() / self.kv_heads, ks.len() / self.kv_heads);
        let coded = |(codes, scales)| CodedMut { codes, scales };
        let keys = kc.chunks_mut(codes).zip(ks.chunks_mut(scales)).map(coded);
        let values = vc.chunks_mut(codes).zip(vs.chunks_mut(scales)).map(coded);
        self.write(
            keys.zip(values)
                .map(|(keys, values)| CodesWriter {
                    bits,
                    head_dim: self.head_dim,
                    keys,
                    values,
                })
                .collect(),
        );
        let cache = Codes::<BITS> {
            dims,
            keys: Coded {
                codes: &kc,
                scales: &ks,
            },
            values: Coded {
                codes: &vc,
                scales: &vs,
            },
        };
        let want = self.reference(
            &rounded(bits, &self.keys, self.head_dim, true),
            &rounded(bits, &self.values, self.head_dim, false),
        );
        for isa in self.kernels() {
            for (out, want) in self.attend(isa, &[cache]).iter().zip(&want) {
                let off = (out - want).abs();
                assert!(off < self.most(2e-5), "{isa:?} {bits:?}: {out} {want}");
            }
        }
    }
}

/// What codes make of rows of `d` elements.
fn rounded(bits: Bits, rows: &[f32], d: usize, turned: bool) -> Vec<f32> {
    let round = |row: &[f32]| {
        let mut row = row.to_vec();
        row.resize(padded(d), 0.0);
        for group in row.as_chunks_mut::<GROUP>().0 {
            if turned {
                codes::turn(group);
            }
            let (new, scale) = codes::encode(bits, group);
            *group = new.map(|code| f32::from(code) * scale.to_f32());
            if turned {
                codes::turn(group);
            }
        }
        row
    };
    // What the padding takes is not part of a query's product.
    rows.chunks(d)
        .flat_map(|row| round(row).into_iter().take(d))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn attention_matches_the_definition_for_odd_shapes(
        n in 1usize..20, n_past in 0usize..300, kv_heads in 1usize..4, group in 1usize..10,
        half_dim in 1usize..70, window in proptest::option::of(1usize..160), spare in 0usize..3,
        chunk in proptest::option::of(1usize..200),
    ) {
        let visible = Visible { n_past, window, chunk };
        let case = Case::new(n, visible, (kv_heads, group), 2 * half_dim);
        case.check::<f32>(spare);
        case.check::<bf16>(spare);
        case.check::<f16>(spare);
        case.check_codes::<8>(Bits::Eight, spare);
        case.check_codes::<4>(Bits::Four, spare);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn attention_of_many_tokens_may_round_what_it_multiplies(
        n in 30usize..90, n_past in 0usize..300, kv_heads in 1usize..3, group in 1usize..10,
        half_dim in 1usize..70, window in proptest::option::of(1usize..160), spare in 0usize..3,
    ) {
        let visible = Visible { n_past, window, chunk: None };
        for d in [64, 128, 2 * half_dim] {
            let mut case = Case::new(n, visible, (kv_heads, group), d);
            case.rounds = true;
            case.check::<f32>(spare);
            case.check::<bf16>(spare);
            case.check::<f16>(spare);
            case.check_codes::<8>(Bits::Eight, spare);
            case.check_codes::<4>(Bits::Four, spare);
        }
    }
}

/// Pages in any order in memory, the last one not full.
#[test]
fn pages_are_one_cache() {
    for (n, n_past, window, chunk) in [
        (1, 300, None, None),
        (9, 250, Some(140), None),
        (140, 127, None, Some(100)),
    ] {
        let visible = Visible {
            n_past,
            window,
            chunk,
        };
        let case = Case::new(n, visible, (2, 3), 24);
        let (d, length, kv_heads) = (case.head_dim, case.length(), case.kv_heads);
        let dims = Dims {
            kv_heads,
            capacity: TILE,
            head_dim: d,
        };
        let n_pages = length.div_ceil(TILE);
        let mut keys = vec![vec![f32::NAN; kv_heads * TILE * d]; n_pages];
        let mut values = keys.clone();
        for (page, (keys, values)) in keys.iter_mut().zip(&mut values).enumerate() {
            let heads = keys.chunks_mut(TILE * d).zip(values.chunks_mut(TILE * d));
            for (head, (keys, values)) in heads.enumerate() {
                let mut writer = FloatsWriter {
                    head_dim: d,
                    keys,
                    values,
                };
                for position in page * TILE..length.min((page + 1) * TILE) {
                    let row = (head * length + position) * d;
                    writer.key(position % TILE, &case.keys[row..][..d]);
                    writer.value(position % TILE, &case.values[row..][..d]);
                }
            }
        }
        let pages: Vec<_> = keys
            .iter()
            .zip(&values)
            .map(|(keys, values)| Floats { dims, keys, values })
            .collect();
        let want = case.reference(&case.keys, &case.values);
        for isa in Isa::available() {
            for (out, want) in case.attend(isa, &pages).iter().zip(&want) {
                assert!((out - want).abs() < 1e-5, "{isa:?}: {out} {want}");
            }
        }
    }
}

#[test]
fn shares_of_the_keys_add_up() {
    let pool = std::sync::Arc::new(pool::Pool::new(3).expect("threads start"));
    pool::with_pool(&pool, || {
        let cases = [
            (1, 4099, None, None),
            (1, 4099, Some(3000), None),
            (3, 2000, None, Some(700)),
            (40, 2000, Some(1100), None),
        ];
        for (n, n_past, window, chunk) in cases {
            assert!(shares(n_past, 4) > 1);
            let visible = Visible {
                n_past,
                window,
                chunk,
            };
            let mut case = Case::new(n, visible, (2, 7), 64);
            case.rounds = n > TOKENS;
            case.check::<f16>(1);
            case.check_codes::<8>(Bits::Eight, 1);
        }
    });
}

#[test]
fn scores_beyond_the_f16_range_stay_finite() {
    let mut case = Case::new(1, Visible::all(1), (1, 1), 8);
    case.q.fill(400.0);
    case.keys.fill(400.0);
    case.values.fill(1.0);
    for isa in Isa::available() {
        assert!(
            case.run::<f32>(isa, 0)
                .iter()
                .all(|out| (out - 1.0).abs() < 1e-6)
        );
    }
}

#[test]
fn a_nan_reaches_the_output_of_its_row() {
    let mut case = Case::new(2, Visible::all(3), (1, 2), 16);
    case.q[16] = f32::NAN; // the second head of the first token
    for isa in Isa::available() {
        let out = case.run::<f32>(isa, 0);
        assert!(out[16..32].iter().all(|out| out.is_nan()), "{isa:?}");
        assert!(
            out[..16]
                .iter()
                .chain(&out[32..])
                .all(|out| out.is_finite()),
            "{isa:?}"
        );
    }
}
