//! The arguments, which are also their own help.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use qwen2_core::GenerateOptions;

/// The Qwen2 language models on this machine.
#[derive(Debug, Parser)]
#[command(name = "qwen2", version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Talk to a model; without MODEL, to the small demo model that is built in.
    Chat(ChatArgs),
    /// Continue a text, or answer one message with --chat.
    Generate(GenerateArgs),
    /// What a checkpoint is and what it needs; reads no weights.
    Info(InfoArgs),
    /// The tokens of a text, or the text of tokens.
    Tokenize(TokenizeArgs),
    /// Pack a checkpoint into a new directory, which loads at once and takes less room.
    Quantize(QuantizeArgs),
    /// Write a checkpoint in another form: a GGUF file, or a directory of safetensors.
    Convert(ConvertArgs),
    /// Add a LoRA adapter to a checkpoint for good.
    MergeLora(MergeArgs),
    /// How well a model foretells a text file.
    Perplexity(PerplexityArgs),
    /// Measure speed, next to what the memory allows.
    Bench(BenchArgs),
    /// Answer over HTTP as OpenAI's API does, with a chat page at /.
    #[cfg(feature = "serve")]
    Serve(ServeArgs),
}

impl Command {
    /// Whether it serves until a signal ends it.
    pub(crate) fn is_server(&self) -> bool {
        #[cfg(feature = "serve")]
        return matches!(self, Self::Serve(_));
        #[cfg(not(feature = "serve"))]
        false
    }
}

/// How to load a model.
#[derive(Args, Debug, Default)]
pub(crate) struct LoadArgs {
    /// auto, cpu, wgpu, vulkan, metal, webgpu, cuda or ndarray; GPUs also as cuda:1.
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// Keep the weights as f32, f16 or bf16 [default: as stored].
    #[arg(long)]
    pub(crate) dtype: Option<String>,
    /// Pack the weights into q8 (8.5 bits) or q4 (4.5 bits) while loading.
    #[arg(long)]
    pub(crate) quantize: Option<String>,
    /// What prefill multiplies bf16 weights in, f32 or bf16 [default: f32].
    #[arg(long)]
    pub(crate) activations: Option<String>,
    /// What keys and values are kept in, f32, f16, bf16, q8 or q4 [default: f16, beside f32 f32].
    #[arg(long)]
    pub(crate) kv_cache: Option<String>,
    /// Copy the weights into memory instead of using them from the file.
    #[arg(long)]
    pub(crate) preload: bool,
    /// Rank tokens by a copy of the packed head in four bits, and compute only the best by the head.
    #[arg(long)]
    pub(crate) screened_head: bool,
    /// Add the LoRA adapter in this directory, as PEFT saves it, to the weights.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// Tokens of prompt and answer together [default: all the model can].
    #[arg(long)]
    pub(crate) context_length: Option<usize>,
    /// What reaches beyond the trained length, yarn, yarn_when_needed or dual_chunk [default: yarn].
    #[arg(long)]
    pub(crate) long_context: Option<String>,
    /// Threads on the processor [default: all that may be used].
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}

/// How to generate; what is not given is as the checkpoint's generation_config.json says.
#[derive(Args, Debug, Default)]
pub(crate) struct SampleArgs {
    /// Most tokens to produce [default: to the end of the context].
    #[arg(long)]
    pub(crate) max_new_tokens: Option<usize>,
    /// The likeliest token every time.
    #[arg(long, conflicts_with = "temperature")]
    pub(crate) greedy: bool,
    /// 0 to 100; 0 is greedy.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Keep the k likeliest tokens.
    #[arg(long)]
    pub(crate) top_k: Option<usize>,
    /// Keep the likeliest tokens of this probability together, above 0 to 1.
    #[arg(long)]
    pub(crate) top_p: Option<f32>,
    /// Drop tokens below this share of the likeliest one, 0 to 1.
    #[arg(long)]
    pub(crate) min_p: Option<f32>,
    /// Keep the tokens of the most typical information, of this probability together, above 0 to 1.
    #[arg(long)]
    pub(crate) typical_p: Option<f32>,
    /// Above 1: repeat less.
    #[arg(long)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Taken from the logits of tokens that were produced, -2 to 2.
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Taken from the logits of tokens as often as they were produced, -2 to 2.
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// ID=BIAS, -100 to 100, added to the logit of a token; may be given several times.
    #[arg(long, value_parser = id_and_bias)]
    pub(crate) logit_bias: Vec<(u32, f32)>,
    /// Never produce this text; may be given several times.
    #[arg(long)]
    pub(crate) bad_word: Vec<String>,
    /// Least tokens to produce.
    #[arg(long)]
    pub(crate) min_new_tokens: Option<usize>,
    /// With --json, say how likely each token was, and as many of the likeliest ones.
    #[arg(long)]
    pub(crate) logprobs: Option<usize>,
    /// Same seed, same answer.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// End before this text; may be given several times.
    #[arg(long)]
    pub(crate) stop: Vec<String>,
}

/// `ID=BIAS`.
fn id_and_bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once('=');
    let parsed = parts.and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    parsed.ok_or_else(|| "expected ID=BIAS, for example 42=-1.5".to_owned())
}

impl SampleArgs {
    pub(crate) fn options(&self) -> GenerateOptions {
        let mut options = if self.greedy {
            GenerateOptions::greedy()
        } else {
            GenerateOptions::new()
        };
        options.max_new_tokens = self.max_new_tokens;
        options.temperature = self.temperature.or(options.temperature);
        options.top_k = self.top_k;
        options.top_p = self.top_p;
        options.min_p = self.min_p;
        options.typical_p = self.typical_p;
        options.repetition_penalty = self.repetition_penalty.or(options.repetition_penalty);
        options.presence_penalty = self.presence_penalty;
        options.frequency_penalty = self.frequency_penalty;
        options.logit_bias = self.logit_bias.iter().copied().collect();
        options.bad_words = self
            .bad_word
            .iter()
            .map(|word| word.as_str().into())
            .collect();
        options.min_new_tokens = self.min_new_tokens;
        options.logprobs = self.logprobs;
        options.seed = self.seed;
        options.stop.clone_from(&self.stop);
        options
    }
}

#[derive(Args, Debug)]
pub(crate) struct ChatArgs {
    /// A directory, a GGUF file, or an id of a hub such as Qwen/Qwen2-0.5B-Instruct [default: the demo model].
    pub(crate) model: Option<OsString>,
    /// Instructions for the model [default: the chat template's own].
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// One JSON object a line for each answer instead of text.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) sample: SampleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct GenerateArgs {
    /// A directory, a GGUF file, or an id of a hub such as Qwen/Qwen2-0.5B-Instruct.
    pub(crate) model: OsString,
    /// The text to continue; - reads it from stdin, without the newline at its end.
    pub(crate) prompt: String,
    /// Answer PROMPT as a message, through the checkpoint's chat template.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Instructions for the model, with --chat [default: the chat template's own].
    #[arg(long, requires = "chat")]
    pub(crate) system: Option<String>,
    /// One JSON object at the end instead of text as it comes.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) sample: SampleArgs,
}

#[derive(Args, Debug)]
pub(crate) struct InfoArgs {
    /// A directory, a GGUF file, a config.json, the directory of an adapter, or an id of a hub [default:
    /// the demo model].
    pub(crate) model: Option<OsString>,
    /// Memory for weights of this precision, f32, f16 or bf16 [default: as stored].
    #[arg(long)]
    pub(crate) dtype: Option<String>,
    /// Memory for weights that are packed into q8 or q4 while loading.
    #[arg(long, conflicts_with = "dtype")]
    pub(crate) quantize: Option<String>,
    /// Memory for keys and values in f32, f16, bf16, q8 or q4 [default: f16, beside f32 f32].
    #[arg(long)]
    pub(crate) kv_cache: Option<String>,
    /// Memory for this context [default: all the model can].
    #[arg(long)]
    pub(crate) context_length: Option<usize>,
    /// What reaches beyond the trained length, yarn, yarn_when_needed or dual_chunk [default: yarn].
    #[arg(long)]
    pub(crate) long_context: Option<String>,
    /// Memory on this device [default: auto, the best that is found].
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct TokenizeArgs {
    /// A directory, a GGUF file, or an id of a hub.
    pub(crate) model: OsString,
    /// The text, or with --decode the ids; - reads stdin, without the newline at its end.
    pub(crate) text: String,
    /// TEXT as a message, with what the checkpoint's chat template puts around it.
    #[arg(long)]
    pub(crate) chat: bool,
    /// TEXT is ids, separated by spaces or commas: print their text.
    #[arg(long, conflicts_with = "chat")]
    pub(crate) decode: bool,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct QuantizeArgs {
    /// A directory, a GGUF file, or an id of a hub.
    pub(crate) model: OsString,
    /// Where to put the packed checkpoint, a directory, or a file if its name ends in .gguf; must not
    /// exist.
    pub(crate) destination: PathBuf,
    /// q8 (8.5 bits a weight) or q4 (4.5 bits; embedding and head q8).
    #[arg(long, default_value = "q8")]
    pub(crate) precision: String,
    /// packed (our own directory) or gguf (Q8_0, Q4_0) [default: by the name of the destination].
    #[arg(long)]
    pub(crate) format: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct ConvertArgs {
    /// A directory, a GGUF file, or an id of a hub.
    pub(crate) model: OsString,
    /// A GGUF file if the name ends in .gguf, else a directory; must not exist.
    pub(crate) destination: PathBuf,
    /// Write the weights as f32, f16 or bf16 [default: as stored, blocks of a GGUF file as bf16].
    #[arg(long)]
    pub(crate) dtype: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct MergeArgs {
    /// A directory, a GGUF file, or an id of a hub.
    pub(crate) model: OsString,
    /// The directory of the adapter, as PEFT saves it.
    pub(crate) adapter: PathBuf,
    /// A GGUF file if the name ends in .gguf, else a directory; must not exist.
    pub(crate) destination: PathBuf,
    /// Write the weights as f32, f16 or bf16 [default: as stored, blocks of a GGUF file as bf16].
    #[arg(long)]
    pub(crate) dtype: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct PerplexityArgs {
    /// A directory, a GGUF file, or an id of a hub.
    pub(crate) model: OsString,
    /// A text file in UTF-8.
    pub(crate) text: PathBuf,
    /// Tokens of a window [default: 2048, or the model's context if that is less].
    #[arg(long)]
    pub(crate) window: Option<usize>,
    /// Tokens from one window's start to the next's [default: half a window].
    #[arg(long)]
    pub(crate) stride: Option<usize>,
    /// One JSON object instead of a line.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// A directory, a GGUF file, or an id of a hub [default: random weights of --shape].
    #[arg(conflicts_with = "shape")]
    pub(crate) model: Option<OsString>,
    /// Random weights of a published shape: 0.5b, 1.5b, 7b, 57b-a14b or 72b [default: 0.5b].
    #[arg(long)]
    pub(crate) shape: Option<String>,
    /// So many layers of the shape instead of all, to measure what does not fit whole.
    #[arg(long, conflicts_with = "model")]
    pub(crate) layers: Option<usize>,
    /// f32, bf16, f16, q8 or q4 [default: bf16 for a shape, as stored for a model].
    #[arg(long)]
    pub(crate) precision: Option<String>,
    /// What prefill multiplies bf16 weights in, f32 or bf16 [default: f32].
    #[arg(long)]
    pub(crate) activations: Option<String>,
    /// What keys and values are kept in, f32, f16, bf16, q8 or q4 [default: f16, beside f32 f32].
    #[arg(long)]
    pub(crate) kv_cache: Option<String>,
    /// Tokens that prompt and answer may have together; more than the model has stretches it.
    #[arg(long)]
    pub(crate) context_length: Option<usize>,
    /// What a longer context is reached by: yarn, yarn_when_needed or dual_chunk [default: yarn].
    #[arg(long)]
    pub(crate) long_context: Option<String>,
    /// Copy the weights into memory instead of using them from the file.
    #[arg(long)]
    pub(crate) preload: bool,
    /// Rank tokens by a copy of the packed head in four bits, and compute only the best by the head.
    #[arg(long)]
    pub(crate) screened_head: bool,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    pub(crate) prompt: usize,
    /// Tokens to produce, at least 2.
    #[arg(long, default_value_t = 128)]
    pub(crate) new: usize,
    /// Runs; medians are reported.
    #[arg(long, default_value_t = 3)]
    pub(crate) repeat: usize,
    /// Threads on the processor [default: all that may be used].
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// auto, cpu, wgpu, vulkan, metal, webgpu, cuda or ndarray.
    #[arg(long, default_value = "cpu")]
    pub(crate) device: String,
    /// One more run, which times every part of the network.
    #[arg(long)]
    pub(crate) profile: bool,
    /// Then so many requests at once in an engine, beside one alone; and a short prompt behind a long one.
    #[arg(long)]
    pub(crate) streams: Option<usize>,
    /// One JSON object instead of lines.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(feature = "serve")]
#[derive(Args, Debug)]
pub(crate) struct ServeArgs {
    /// A directory, a GGUF file, or an id of the hub [default: the demo model].
    pub(crate) model: Option<OsString>,
    /// The address to listen at; 0.0.0.0 is all of this machine's.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// The port; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// What clients call the model [default: the model's own name].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// What clients must send as Authorization: Bearer KEY [default: the variable QWEN2_API_KEY, or nothing].
    #[arg(long)]
    pub(crate) api_key: Option<String>,
    /// Most bytes of a request's body.
    #[arg(long, default_value_t = 8 << 20)]
    pub(crate) max_body: usize,
    /// Most new tokens of one answer [default: to the end of the context].
    #[arg(long)]
    pub(crate) max_new_tokens: Option<usize>,
    /// What embeddings are made of, mean or last_token.
    #[arg(long, default_value = "mean")]
    pub(crate) pooling: String,
    /// Answers that are computed together.
    #[arg(long, default_value_t = 64)]
    pub(crate) max_running: usize,
    /// Answers that may wait for their turn; more are refused.
    #[arg(long, default_value_t = 128)]
    pub(crate) max_waiting: usize,
    /// Bytes that the caches of answers and shared beginnings of prompts may take together [default: those of
    /// four answers that fill the context].
    #[arg(long)]
    pub(crate) cache_memory: Option<u64>,
    /// Read every prompt whole, also where it begins as an earlier one.
    #[arg(long)]
    pub(crate) no_prefix_cache: bool,
    /// Give the same answer alone and among others, to the last bit; slower.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// Connections that are open at the same time.
    #[arg(long, default_value_t = 1024)]
    pub(crate) max_connections: usize,
    /// Seconds from a request to the end of its answer.
    #[arg(long, default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Seconds that a client may send nothing of its request, or read nothing of its answer.
    #[arg(long, default_value_t = 30)]
    pub(crate) patience: u64,
    /// Seconds that running answers may go on when the server is told to end.
    #[arg(long, default_value_t = 30)]
    pub(crate) grace: u64,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_not_given_stays_unset() {
        assert_eq!(SampleArgs::default().options(), GenerateOptions::new());
        let greedy = SampleArgs {
            greedy: true,
            ..SampleArgs::default()
        };
        assert_eq!(greedy.options(), GenerateOptions::greedy());
    }
}
