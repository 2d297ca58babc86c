//! What a long prompt costs in memory: its keys and values, and nothing else that grows.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use peak_alloc::PeakAlloc;
use qwen2_core::{Device, GenerateOptions, KvCacheType, LongContext, Model, ModelConfig, Prompt};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const SHORT: usize = 4096;
const LONG: usize = 20_480;

/// Two layers (the last one computes its last token alone) with the ratios of Qwen2-7B's heads, trained on
/// 8192 tokens.
fn config() -> ModelConfig {
    let json = r#"{
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512,
        "max_position_embeddings": 8192, "tie_word_embeddings": true
    }"#;
    ModelConfig::from_json(json.as_bytes(), Path::new("config.json")).unwrap()
}

/// The most memory of the allocator that reading a prompt of `n` tokens and two more take. The keys and values
/// of a prompt lie in mappings of their own, but for the last page.
fn beside_the_cache(model: &Model, n: usize) -> usize {
    let prompt: Vec<u32> = (0..n).map(|i| (i * 7919 % 512) as u32).collect();
    let options = GenerateOptions::greedy().ignore_eos(true).max_new_tokens(2);
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    let generation = model.generate(Prompt::Tokens(prompt), &options).unwrap();
    let held = MEMORY.peak_usage() - before;
    assert_eq!(generation.usage.prompt_tokens, n);
    assert_eq!(generation.tokens.len(), 2);
    held
}

/// One test for all, because the counter is one for all threads.
#[test]
fn a_prompt_of_twenty_thousand_tokens_costs_its_cache_alone() {
    for (kv_cache, by) in [
        (KvCacheType::Q8, LongContext::Yarn),
        (KvCacheType::Q4, LongContext::DualChunk),
    ] {
        let builder = Model::random(&config()).device(Device::cpu());
        let builder = builder.kv_cache(kv_cache).threads(2);
        let model = builder
            .context_length(LONG + 2)
            .long_context(by)
            .load()
            .unwrap();
        beside_the_cache(&model, 600); // threads take their buffers once
        let (short, long) = (
            beside_the_cache(&model, SHORT),
            beside_the_cache(&model, LONG),
        );
        // Sixteen bytes a token: the ids, where they are kept and where they are passed on.
        let most = short + 16 * (LONG - SHORT) + (64 << 10);
        assert!(
            long <= most,
            "{kv_cache}, {by}: {short} bytes beside the cache become {long}"
        );
        let cache = model.memory().cache_per_token as usize * LONG;
        assert!(
            long < cache,
            "{kv_cache}, {by}: {long} bytes, with all of {cache}"
        );
    }
}
