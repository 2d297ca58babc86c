//! Times candle: `engine-candle MODEL THREADS PROMPT NEW`, one line of JSON. MODEL is a GGUF file, or a directory
//! whose weights become f32, as candle's own examples have it on a processor.

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

use candle_core::quantized::gguf_file;
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::quantized_qwen2::ModelWeights;
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
use serde_json::{Value, json};

enum Model {
    Dense(Box<ModelForCausalLM>),
    Quantized(Box<ModelWeights>),
}

impl Model {
    fn load(path: &Path) -> std::result::Result<Self, Box<dyn Error>> {
        if path.is_file() {
            let mut file = File::open(path)?;
            let content = gguf_file::Content::read(&mut file)?;
            let model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
            return Ok(Self::Quantized(Box::new(model)));
        }
        let mut config: Value = serde_json::from_reader(File::open(path.join("config.json"))?)?;
        // What transformers 5 keeps elsewhere, and candle asks for though it is not used.
        config["rope_theta"] = config["rope_parameters"]["rope_theta"].take();
        config["sliding_window"] = json!(32768);
        let config: Config = serde_json::from_value(config)?;
        let file = std::fs::read(path.join("model.safetensors"))?;
        let weights = VarBuilder::from_buffered_safetensors(file, DType::F32, &Device::Cpu)?;
        let model = ModelForCausalLM::new(&config, weights)?;
        Ok(Self::Dense(Box::new(model)))
    }

    /// The likeliest token behind `tokens`, of which `n_past` came before.
    fn next(&mut self, tokens: &[u32], n_past: usize) -> Result<u32> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let logits = match self {
            Self::Dense(model) => model.forward(&tokens, n_past)?,
            Self::Quantized(model) => model.forward(&tokens, n_past)?,
        };
        logits.argmax(D::Minus1)?.flatten_all()?.get(0)?.to_scalar()
    }
}

/// The most memory that the process had, in MB.
fn memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes / 1e3)
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // The threads are those of RAYON_NUM_THREADS, which the caller sets.
    let [model, _threads, prompt, new] = arguments.as_slice() else {
        return Err("MODEL THREADS PROMPT NEW".into());
    };
    let (prompt, new): (u32, usize) = (prompt.parse()?, new.parse()?);
    let start = Instant::now();
    let mut model = Model::load(Path::new(model))?;
    let load = start.elapsed().as_secs_f64();
    let tokens: Vec<u32> = (0..prompt).map(|i| i * 7919 % 50_000 + 300).collect();
    // A first token begins anew, whatever came before.
    model.next(&tokens[..16], 0)?;
    if let Model::Dense(model) = &mut model {
        model.clear_kv_cache();
    }
    let start = Instant::now();
    let mut token = model.next(&tokens, 0)?;
    let prefill = f64::from(prompt) / start.elapsed().as_secs_f64();
    let start = Instant::now();
    for i in 0..new {
        token = model.next(&[token], tokens.len() + i)?;
    }
    let decode = new as f64 / start.elapsed().as_secs_f64();
    let found = json!({"load": load, "prefill": prefill, "decode": decode, "memory": memory()});
    println!("{found}");
    Ok(())
}
