//! A screened head chooses the tokens that the whole head chooses.
#![allow(clippy::unwrap_used)]

mod common;

use common::{builder, demo, fixture};
use qwen2_core::{DType, ErrorKind, GenerateOptions, Message, Model, ModelConfig, Quantization};

/// Random weights, where the highest logits are closer to each other than in any trained model.
fn random(quantization: Quantization, screened: bool) -> Model {
    let config = serde_json::json!({
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20_000,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    let config = config.to_string();
    let config = ModelConfig::from_json(config.as_bytes(), "config.json".as_ref()).unwrap();
    Model::random(&config)
        .device("cpu".parse().unwrap())
        .dtype(DType::F32)
        .quantize(quantization)
        .screened_head(screened)
        .load()
        .unwrap()
}

#[test]
fn ten_thousand_steps_choose_as_the_whole_head_does() {
    let mut steps = 0;
    let mut other = 0;
    for quantization in [Quantization::Q8, Quantization::Q4] {
        let [whole, screened] = [false, true].map(|screened| random(quantization, screened));
        for prompt in 0..250_u32 {
            let tokens = [prompt * 79 % 20_000, prompt, 5];
            let options = match prompt % 2 {
                0 => GenerateOptions::greedy(),
                _ => GenerateOptions::new()
                    .temperature(0.8)
                    .top_k(20)
                    .seed(prompt.into()),
            };
            let options = options.ignore_eos(true).max_new_tokens(20);
            let [want, got] = [&whole, &screened]
                .map(|model| model.generate(tokens.to_vec(), &options).unwrap().tokens);
            assert_eq!(want.len(), 20);
            steps += 20;
            other += usize::from(want != got); // what follows another token is another text
        }
    }
    assert_eq!(steps, 10_000);
    assert!(other <= 10, "{other} of {steps} steps");
}

#[test]
fn a_choice_among_all_tokens_takes_the_whole_head() {
    let [whole, screened] = [false, true].map(|screened| random(Quantization::Q8, screened));
    for seed in 0..50 {
        let options = GenerateOptions::new()
            .temperature(2.0)
            .seed(seed)
            .max_new_tokens(8);
        let options = options.ignore_eos(true);
        let [want, got] = [&whole, &screened]
            .map(|model| model.generate(vec![1, 2, 3], &options).unwrap().tokens);
        assert_eq!(want, got, "seed {seed}");
    }
    let logits = [&whole, &screened].map(|model| model.logits(&[1, 2, 3]).unwrap().values);
    assert_eq!(logits[0], logits[1]);
}

#[test]
fn the_demo_model_answers_with_it() {
    let model = builder(demo())
        .quantize(Quantization::Q4)
        .screened_head(true)
        .load()
        .unwrap();
    let plain = builder(demo()).quantize(Quantization::Q4).load().unwrap();
    for question in [
        "What is 12 plus 30?",
        "Which is larger, 17 or 71?",
        "Count from 3 to 9.",
    ] {
        let ask = |model: &Model| {
            let options = GenerateOptions::greedy();
            model
                .chat(&[Message::user(question)], &options)
                .unwrap()
                .tokens
        };
        assert_eq!(ask(&model), ask(&plain), "{question}");
    }
    // A step reads the screen for the head, and the screen takes room.
    assert!(model.memory().weights > plain.memory().weights);
    assert!(model.memory().weights_per_token < plain.memory().weights_per_token);
}

#[test]
fn only_packed_heads_are_screened() {
    let error = builder(fixture("tied"))
        .screened_head(true)
        .load()
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(
        error.to_string(),
        "head cannot be screened: screened_head: it is for packed weights on the CPU"
    );
    assert!(error.help().is_some());
}
