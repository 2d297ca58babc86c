//! From arguments to a loaded model, with a bar on the way.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use qwen2_core::{
    KvCacheType, LongContext, Model, ModelBuilder, ModelConfig, Progress, RopeScaling, Source,
};

use crate::args::LoadArgs;
use crate::failure::Failure;
use crate::{demo, output};

/// Loads `model`, or the demo model.
pub(crate) fn load(model: Option<&OsStr>, args: &LoadArgs) -> Result<Model, Failure> {
    let source = match model {
        Some(model) => source(model),
        None => Source::from(demo::directory()?),
    };
    finish(Model::builder(source), args)
}

/// A path or an id of the hub; what is not Unicode can only be a path.
pub(crate) fn source(model: &OsStr) -> Source {
    model
        .to_str()
        .map_or_else(|| Source::from(Path::new(model)), Source::from)
}

/// The builder with the settings of the arguments.
fn apply(mut builder: ModelBuilder, args: &LoadArgs) -> Result<ModelBuilder, Failure> {
    builder = builder.device(args.device.parse()?);
    if let Some(dtype) = &args.dtype {
        builder = builder.dtype(dtype.parse()?);
    }
    if let Some(quantization) = &args.quantize {
        builder = builder.quantize(quantization.parse()?);
    }
    if let Some(dtype) = &args.activations {
        builder = builder.activations(dtype.parse()?);
    }
    if let Some(dtype) = &args.kv_cache {
        builder = builder.kv_cache(dtype.parse::<KvCacheType>()?);
    }
    builder = builder
        .preload(args.preload)
        .screened_head(args.screened_head);
    if let Some(adapter) = &args.adapter {
        builder = builder.adapter(adapter);
    }
    if let Some(n_tokens) = args.context_length {
        builder = builder.context_length(n_tokens);
    }
    if let Some(by) = &args.long_context {
        builder = builder.long_context(by.parse()?);
    }
    if let Some(threads) = args.threads {
        builder = builder.threads(threads);
    }
    Ok(builder)
}

/// Loads with the settings of the arguments and a bar where a person looks on, and says on stderr if the
/// context is a stretched one.
pub(crate) fn finish(builder: ModelBuilder, args: &LoadArgs) -> Result<Model, Failure> {
    let builder = apply(builder, args)?;
    let model = with_bar("loading", |progress| builder.progress(progress).load())?;
    let by = match &args.long_context {
        Some(by) => by.parse()?,
        None => LongContext::default(),
    };
    if let Some(stretch) = stretch(model.config(), model.context_length(), by) {
        output::note(&stretch);
    }
    Ok(model)
}

/// What reaches beyond the trained length, and how far; `None` where nothing has to.
fn stretch(config: &ModelConfig, context_length: usize, by: LongContext) -> Option<String> {
    let factor = |factor: f64, trained: usize| {
        let factor = (factor * 1000.0).round() / 1000.0;
        format!(", factor {factor} over the {trained} of training")
    };
    let how = if let Some(chunks) = config.dual_chunk_attention {
        if context_length <= chunks.chunk_length() {
            return None; // as without chunks
        }
        let far = chunks
            .original_max_position_embeddings
            .filter(|trained| context_length > *trained)
            .map(|trained| factor(context_length as f64 / trained as f64, trained));
        let length = chunks.chunk_length();
        let far = far.unwrap_or_default();
        format!("dual chunk attention, chunks of {length}{far}")
    } else {
        let Some(RopeScaling::Yarn { factor: times, .. }) = config.rope_scaling else {
            return None;
        };
        let trained = config.trained_length();
        let when = match by {
            LongContext::YarnWhenNeeded if context_length <= trained => return None,
            LongContext::YarnWhenNeeded => "for longer texts only",
            _ => "for short texts as well",
        };
        format!("YaRN{}, {when}", factor(times, trained))
    };
    Some(format!("context of {context_length} tokens: {how}"))
}

/// What is called while work goes on.
type Report = Box<dyn FnMut(Progress) -> ControlFlow<()> + Send>;

/// Does `work` with a bar where a person looks on.
pub(crate) fn with_bar<R>(verb: &'static str, work: impl FnOnce(Report) -> R) -> R {
    if !output::stderr_is_terminal() {
        return work(Box::new(|_| ControlFlow::Continue(())));
    }
    let bar = ProgressBar::new(0).with_style(style()).with_message(verb);
    // What is done at once is over before a bar could be read.
    bar.enable_steady_tick(Duration::from_millis(200));
    let moving = bar.clone();
    let result = work(Box::new(move |progress| {
        moving.set_length(progress.bytes_total);
        moving.set_position(progress.bytes_done);
        ControlFlow::Continue(())
    }));
    bar.finish_and_clear();
    result
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
