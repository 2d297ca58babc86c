//! Logits and greedy tokens equal those of Hugging Face transformers in float32.
#![allow(clippy::unwrap_used)]

mod common;

use common::{builder, device, fixture, floats, ids, json, max_difference, root, rows, unrounded};
use qwen2_core::{DType, ErrorKind, GenerateOptions, KvCacheType, Prompt, RopeScaling};

const MODELS: [&str; 18] = [
    "tied",
    "untied",
    "tied_flag_untied_weights",
    "mqa",
    "gqa7",
    "head_dim_10",
    "head_dim_explicit",
    "bf16_shards",
    "f16",
    "yarn",
    "yarn5",
    "dual_chunk",
    "dual_chunk_yarn",
    "sliding",
    "sliding5",
    "moe",
    "moe_normed_mixed",
    "moe5",
];

/// The project's bound for float32 on logits of size about 4.
const TOLERANCE: f32 = 1e-4;

#[test]
fn logits_equal_the_reference_at_every_position() {
    for name in MODELS.into_iter().filter(|name| !is_rounded(name)) {
        let reference = json(fixture(name).join("reference.json"));
        let model = unrounded(fixture(name)).load().unwrap();
        let logits = model.logits(&ids(&reference["tokens"])).unwrap();
        let want = rows(&reference["logits"]);
        assert_eq!(logits.values.len(), logits.n_tokens * logits.vocab_size);
        let size = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let difference = max_difference(&logits.values, &want);
        assert!(
            difference <= TOLERANCE,
            "{name}: {difference} on logits up to {size}"
        );
        assert!(
            size > 1.0,
            "{name}: a reference of nearly zero proves nothing"
        );
    }
}

#[test]
fn greedy_tokens_equal_the_reference() {
    for name in MODELS {
        let reference = json(fixture(name).join("reference.json"));
        let want = ids(&reference["greedy"]);
        let mut options = GenerateOptions::greedy().max_new_tokens(want.len());
        options.ignore_eos = true;
        let prompt = Prompt::Tokens(ids(&reference["greedy_prompt"]));
        let model = unrounded(fixture(name)).load().unwrap();
        let generation = model.generate(prompt, &options).unwrap();
        assert_eq!(generation.tokens, want, "{name}");
    }
}

#[test]
fn prefill_in_chunks_equals_one_shot() {
    // A chunk of one token is not rounded where longer ones are.
    for name in MODELS.into_iter().filter(|name| !is_rounded(name)) {
        let tokens = ids(&json(fixture(name).join("reference.json"))["tokens"]);
        let whole = unrounded(fixture(name))
            .load()
            .unwrap()
            .logits(&tokens)
            .unwrap()
            .values;
        for chunk in [1, 7, 64] {
            let model = unrounded(fixture(name))
                .prefill_chunk(chunk)
                .load()
                .unwrap();
            let difference = max_difference(&model.logits(&tokens).unwrap().values, &whole);
            assert!(
                difference <= TOLERANCE,
                "{name} in chunks of {chunk}: {difference}"
            );
        }
    }
}

/// Whether prompts' activations are rounded to the weights' 16 bits, as transformers does.
fn rounds_activations() -> bool {
    std::env::var("QWEN2_TEST_DEVICE").is_ok_and(|device| device.starts_with("cuda"))
}

/// Whether the device rounds the activations of the fixture.
fn is_rounded(name: &str) -> bool {
    rounds_activations() && ["bf16_shards", "f16", "moe5"].contains(&name)
}

/// Ours keep f32 activations over bf16 weights, so they are off transformers' bf16 run by no more
/// than that run is off float32 (plus the float32 tolerance).
#[test]
fn bf16_stays_within_the_references_own_rounding() {
    let reference = json(fixture("bf16_shards").join("reference.json"));
    let exact = rows(&reference["logits"]);
    let theirs = rows(&reference["logits_bf16"]);
    let ours = unrounded(fixture("bf16_shards"))
        .load()
        .unwrap()
        .logits(&ids(&reference["tokens"]))
        .unwrap()
        .values;
    let allowed = max_difference(&theirs, &exact);
    let difference = max_difference(&ours, &theirs);
    assert!(
        rounds_activations() || difference <= allowed + TOLERANCE,
        "{difference} from their bf16, which is {allowed} from float32"
    );
    assert!(max_difference(&ours, &exact) <= allowed);
}

/// The cache of a bf16 model is f16 by default: three bits more than what transformers rounds to.
#[test]
fn the_default_cache_rounds_an_eighth_of_what_the_reference_does() {
    let reference = json(fixture("bf16_shards").join("reference.json"));
    let exact = rows(&reference["logits"]);
    let allowed = max_difference(&rows(&reference["logits_bf16"]), &exact);
    let model = builder(fixture("bf16_shards")).load().unwrap();
    let ours = model.logits(&ids(&reference["tokens"])).unwrap().values;
    let difference = max_difference(&ours, &exact);
    let share = if rounds_activations() { 1.0 } else { 8.0 };
    assert!(difference <= allowed / share, "{difference} of {allowed}");
}

/// The quality of it is tests/quality.rs' matter; this runs on every device.
#[test]
fn a_packed_cache_rounds_and_no_more() {
    for name in ["tied", "head_dim_10", "sliding"] {
        let reference = json(fixture(name).join("reference.json"));
        let (tokens, exact) = (ids(&reference["tokens"]), rows(&reference["logits"]));
        let power = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        for (kv_cache, share) in [(KvCacheType::Q8, 0.02), (KvCacheType::Q4, 0.3)] {
            let model = builder(fixture(name)).kv_cache(kv_cache).load().unwrap();
            let ours = model.logits(&tokens).unwrap().values;
            let rounding = power(&mut ours.iter().zip(&exact).map(|(a, b)| a - b));
            let rounding = (rounding / power(&mut exact.iter().copied())).sqrt();
            assert!(
                rounding > 1e-5 && rounding <= share,
                "{name} {kv_cache}: {rounding}"
            );
        }
    }
}

/// Rounded activations are off float32 by less than transformers is when it computes in bf16.
#[test]
fn bf16_activations_round_less_than_the_reference() {
    let reference = json(fixture("bf16_shards").join("reference.json"));
    let exact = rows(&reference["logits"]);
    let allowed = max_difference(&rows(&reference["logits_bf16"]), &exact);
    let model = builder(fixture("bf16_shards"))
        .activations(DType::BF16)
        .load()
        .unwrap();
    let ours = model.logits(&ids(&reference["tokens"])).unwrap().values;
    assert!(max_difference(&ours, &exact) <= allowed);
}

#[test]
fn weights_may_be_kept_in_another_precision() {
    if !device().to_string().starts_with("cpu") {
        return; // other devices choose by what they support
    }
    let reference = json(fixture("tied").join("reference.json"));
    let (tokens, want) = (ids(&reference["tokens"]), rows(&reference["logits"]));
    // 8 and 11 bits of mantissa, on logits of size ~4 behind two layers.
    for (dtype, bound) in [
        (DType::BF16, 0.3),
        (DType::F16, 0.03),
        (DType::F32, TOLERANCE),
    ] {
        let model = builder(fixture("tied")).dtype(dtype).load().unwrap();
        assert_eq!(model.dtype(), dtype);
        let difference = max_difference(&model.logits(&tokens).unwrap().values, &want);
        assert!(difference <= bound, "{dtype:?}: {difference}");
        assert!(
            dtype == DType::F32 || difference > 0.0,
            "{dtype:?} was not applied"
        );
    }
}

#[test]
fn a_longer_context_than_the_trained_one_is_yarn_by_their_ratio() {
    let vectors = json(root().join("conformance/stretched.json"));
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 3);
    for case in cases {
        let (tokens, want) = (ids(&case["tokens"]), floats(&case["logits"]));
        let context = case["context_length"].as_u64().unwrap() as usize;
        let path = fixture(case["model"].as_str().unwrap());
        let model = unrounded(path).context_length(context).load().unwrap();
        assert_eq!(model.context_length(), context);
        let Some(RopeScaling::Yarn { factor, .. }) = model.config().rope_scaling else {
            panic!("no YaRN");
        };
        assert_eq!(factor, context as f64 / 128.0);
        let logits = model.logits(&tokens).unwrap().values;
        let last = &logits[logits.len() - want.len()..];
        let difference = max_difference(last, &want);
        assert!(difference <= TOLERANCE, "{}: {difference}", case["name"]);
    }
}

#[test]
fn a_context_that_yarn_cannot_give_is_refused() {
    for (name, context) in [("tied", 4097), ("yarn", 100_000)] {
        let error = unrounded(fixture(name))
            .context_length(context)
            .load()
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(error.key(), Some("context_length"));
        assert!(error.help().is_some());
    }
    let same = unrounded(fixture("tied"))
        .context_length(128)
        .load()
        .unwrap();
    assert_eq!(same.config().rope_scaling, None);
}
