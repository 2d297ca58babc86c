//! 64 sessions and two engines for ten minutes, with random seeds, lengths, constraints, adapters, timeouts,
//! cancellations and drops, and sessions that are saved and opened: memory must stay flat, no thread may stay
//! behind, and what ends by itself must be what it always is.
//!
//!     cargo run --release -p qwen2-core --example soak -- examples/demo-model [MINUTES] [SESSIONS]
#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use qwen2_core::{
    Constraint, Engine, Error, ErrorKind, FinishReason, GenerateOptions, Generation, Message,
    Model, ModelConfig, Prompt, Request,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What all sessions share.
struct Soak {
    model: Model,
    /// The same with an adapter.
    adapted: Model,
    /// Where sessions are saved.
    directory: PathBuf,
    /// One that shares prefixes and computes its requests together, and one that gives the same tokens
    /// whoever else is there.
    engines: [Engine; 2],
    is_over: AtomicBool,
    /// What a question with a seed gives, from the first time on.
    known: Mutex<HashMap<What, Vec<u32>>>,
    finished: AtomicU64,
    cancelled: AtomicU64,
    dropped: AtomicU64,
    timed_out: AtomicU64,
    refused: AtomicU64,
    reopened: AtomicU64,
}

/// A question, its seed, the form of the answer and whether an adapter gives it.
type What = (usize, u64, usize, bool);

/// What answers may have to look like; the last cannot be compiled.
fn forms() -> [Option<Constraint>; 6] {
    let schema =
        r#"{"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}"#;
    [
        None,
        None,
        Some(Constraint::regex("[0-9]{1,3}( (plus|is) [0-9]{1,3}){0,4}")),
        Some(Constraint::choice(["yes", "no", "perhaps not"])),
        Some(Constraint::json_schema(schema)),
        Some(Constraint::regex("([0-9]")),
    ]
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("soak MODEL [MINUTES] [SESSIONS]")?;
    let minutes: f64 = arguments.next().map_or(Ok(10.0), |text| text.parse())?;
    let sessions: u64 = arguments.next().map_or(Ok(64), |text| text.parse())?;
    let threads_before = n_threads()?;
    let samples = soak(&path, Duration::from_secs_f64(60.0 * minutes), sessions)?;
    // The first fifth fills caches and the allocator's pools.
    let settled = &samples[samples.len() / 5..];
    let (early, late) = settled.split_at(settled.len() / 2);
    let (early, late) = (median(early), median(late));
    println!("memory: {early} MB in the first half, {late} MB in the second");
    if late > early + early / 20 + 4 {
        return Err("memory grew".into());
    }
    // Threads that were joined leave the system's list a little later.
    let patience = Instant::now();
    while n_threads()? > threads_before {
        if patience.elapsed() > Duration::from_secs(5) {
            return Err(format!("{} threads, {threads_before} before", n_threads()?).into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("threads: {threads_before}, as before");
    Ok(())
}

/// Runs it; megabytes of the process, every second.
fn soak(path: &str, time: Duration, sessions: u64) -> Result<Vec<u64>, Failure> {
    let model = Model::load(path)?;
    let directory = tempfile::tempdir()?;
    write_adapter(model.config(), directory.path())?;
    let soak = Soak {
        engines: [engine(&model, false)?, engine(&model, true)?],
        adapted: model.with_adapter(directory.path())?,
        directory: directory.path().to_owned(),
        model,
        is_over: AtomicBool::new(false),
        known: Mutex::default(),
        finished: AtomicU64::new(0),
        cancelled: AtomicU64::new(0),
        dropped: AtomicU64::new(0),
        timed_out: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        reopened: AtomicU64::new(0),
    };
    let mut samples = Vec::new();
    let start = Instant::now();
    let ends = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..sessions)
            .map(StdRng::seed_from_u64)
            .map(|random| scope.spawn(|| soak.work(random)))
            .collect();
        let failed = || {
            workers
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        };
        while start.elapsed() < time && !failed() {
            std::thread::sleep(Duration::from_secs(1));
            samples.extend(resident_megabytes());
        }
        soak.is_over.store(true, Ordering::Relaxed);
        let ends = workers.into_iter().map(|worker| worker.join());
        ends.collect::<Vec<_>>()
    });
    for end in ends {
        end.map_err(|_| "a session panicked")??;
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{} s: {} ended by themselves, {} cancelled, {} dropped, {} out of time, {} refused, {} sessions opened",
        start.elapsed().as_secs(),
        count(&soak.finished),
        count(&soak.cancelled),
        count(&soak.dropped),
        count(&soak.timed_out),
        count(&soak.refused),
        count(&soak.reopened)
    );
    for engine in &soak.engines {
        println!("{:?}", engine.stats());
    }
    if count(&soak.finished) == 0 || samples.len() < 5 {
        return Err("too short to say anything".into());
    }
    soak.engines.iter().for_each(Engine::close);
    Ok(samples)
}

fn engine(model: &Model, deterministic: bool) -> qwen2_core::Result<Engine> {
    let engine = model.engine().max_sequences(24).cache_bytes(64 << 20);
    engine.deterministic(deterministic).build()
}

impl Soak {
    /// One session's user.
    fn work(&self, mut random: StdRng) -> Result<(), Failure> {
        let file = self
            .directory
            .join(format!("{}.session", random.random::<u64>()));
        while !self.is_over.load(Ordering::Relaxed) {
            let question = random.random_range(0..40);
            let seed = random.random_range(0..8);
            let prompt = Prompt::Chat(vec![Message::user(format!(
                "What is {question} plus {}?",
                3 * question + 1
            ))]);
            let mut options = GenerateOptions::new()
                .temperature(0.8)
                .max_new_tokens(random.random_range(1..64));
            options.seed = Some(seed);
            if random.random_bool(0.1) {
                options.timeout = Some(random.random_range(0.001..0.5));
            }
            let form = random.random_range(0..forms().len());
            options.constraint.clone_from(&forms()[form]);
            let adapted = random.random_bool(0.2);
            let what = (question, seed, form, adapted);
            let done = match random.random_range(0..4) {
                0 => self.session(prompt, &options, adapted, &file, &mut random),
                which => self.request(which == 1, prompt, &options, what, &mut random),
            };
            match done {
                Err(error) if form == forms().len() - 1 && is_refusal(&*error) => {
                    self.refused.fetch_add(1, Ordering::Relaxed);
                }
                Ok(()) if form == forms().len() - 1 => {
                    return Err("half a regular expression was taken".into());
                }
                done => done?,
            }
        }
        Ok(())
    }

    fn model(&self, adapted: bool) -> &Model {
        match adapted {
            true => &self.adapted,
            false => &self.model,
        }
    }

    /// A request to one of the engines.
    fn request(
        &self,
        deterministic: bool,
        prompt: Prompt,
        options: &GenerateOptions,
        what: What,
        random: &mut StdRng,
    ) -> Result<(), Failure> {
        let engine = &self.engines[usize::from(deterministic)];
        let request = Request::new(prompt, options).model(self.model(what.3));
        let stream = engine.submit_request(request)?;
        let token = stream.cancel_token();
        let read = read(stream, || token.cancel(), random)?;
        let known = deterministic.then_some(what);
        self.count(read.map(|stream| stream.finish()), known)
    }

    /// A conversation of its own, forked, cut, saved, opened and given up at random.
    fn session(
        &self,
        prompt: Prompt,
        options: &GenerateOptions,
        adapted: bool,
        file: &Path,
        random: &mut StdRng,
    ) -> Result<(), Failure> {
        let model = self.model(adapted);
        let mut session = model.session();
        session.append(prompt)?;
        let mut other = session.fork()?;
        let stream = session.stream(options)?;
        let token = stream.cancel_token();
        let read = read(stream, || token.cancel(), random)?;
        self.count(read.map(|stream| stream.finish()), None)?;
        if random.random_bool(0.3) {
            session.save(file)?;
            let opened = model.open_session(file)?;
            if opened.tokens() != session.tokens() {
                return Err("a session came back with other tokens".into());
            }
            // Behind another model's weights its cache would be worth nothing.
            if self.model(!adapted).open_session(file).is_ok() {
                return Err("a session was opened with another model".into());
            }
            session = opened;
            self.reopened.fetch_add(1, Ordering::Relaxed);
        }
        if random.random_bool(0.5) {
            session.truncate(random.random_range(0..=session.tokens().len()))?;
            other.generate(options)?;
        }
        Ok(())
    }

    /// Books how an answer ended; one that nobody stopped must be a beginning of all others alike.
    fn count(
        &self,
        end: Option<qwen2_core::Result<Generation>>,
        what: Option<What>,
    ) -> Result<(), Failure> {
        let generation = match end {
            None => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Some(Err(error)) if error.kind() == ErrorKind::Cancelled => {
                self.cancelled.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Some(end) => end?,
        };
        let counter = match generation.finish_reason {
            FinishReason::Cancelled => &self.cancelled,
            FinishReason::Timeout => &self.timed_out,
            _ => &self.finished,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let Some(what) = what else { return Ok(()) };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.entry(what).or_default();
        let n = known.len().min(generation.tokens.len());
        if known[..n] != generation.tokens[..n] {
            return Err(format!("{what:?}: {:?}, before {known:?}", generation.tokens).into());
        }
        if n == known.len() {
            *known = generation.tokens;
        }
        Ok(())
    }
}

/// Whether it says that a constraint cannot be compiled.
fn is_refusal(error: &(dyn std::error::Error + 'static)) -> bool {
    let error = error.downcast_ref::<Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::InvalidConstraint)
}

/// An adapter of rank 2 for the query projections, as PEFT would save it.
fn write_adapter(config: &ModelConfig, directory: &Path) -> Result<(), Failure> {
    let (rank, inputs) = (2, config.hidden_size);
    let outputs = config.num_attention_heads * config.head_dim;
    let matrix = |n: usize| -> Vec<u8> {
        let wave = |i: usize| (i as f32 * 0.7).sin() * 0.2;
        (0..n).flat_map(|i| wave(i).to_le_bytes()).collect()
    };
    let (a, b) = (matrix(rank * inputs), matrix(outputs * rank));
    let mut tensors = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let module = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        for (half, shape, bytes) in [
            ("A", vec![rank, inputs], &a),
            ("B", vec![outputs, rank], &b),
        ] {
            let view = TensorView::new(Dtype::F32, shape, bytes)?;
            tensors.push((format!("{module}.lora_{half}.weight"), view));
        }
    }
    let file = safetensors::serialize(tensors, None)?;
    std::fs::write(directory.join("adapter_model.safetensors"), file)?;
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"}"#;
    std::fs::write(directory.join("adapter_config.json"), config)?;
    Ok(())
}

/// Reads a stream: to its end, or some pieces until it is cancelled or dropped (`None`), now and then slowly.
fn read<S, P>(mut stream: S, cancel: impl Fn(), random: &mut StdRng) -> Result<Option<S>, Error>
where
    S: Iterator<Item = Result<P, Error>>,
{
    let patience = match random.random_range(0..3) {
        0 => usize::MAX,
        _ => random.random_range(0..40),
    };
    let is_slow = random.random_bool(0.1);
    for _ in 0..patience {
        match stream.next() {
            None => return Ok(Some(stream)),
            Some(piece) => piece.map(drop)?,
        }
        if is_slow {
            std::thread::sleep(Duration::from_millis(random.random_range(0..20)));
        }
    }
    if random.random_bool(0.5) {
        return Ok(None);
    }
    cancel();
    Ok(Some(stream))
}

/// Memory of the process.
fn resident_megabytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes / 1024)
}

fn n_threads() -> std::io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}
