//! LoRA adapters (arXiv:2106.09685) as the PEFT library saves them: what is added to matrices.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::bytes::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::Encoding;
use super::directory::Directory;
use super::mmap;
use super::safetensors::{self, Extra};
use super::source::adapter_directory;
use crate::config::{DType, json_why, one_line};
use crate::error::{Error, ErrorKind, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of a module's name.
const PREFIX: &str = "base_model.model.";
const MAX_CONFIG: u64 = 16 << 20;
/// The 57B model has some 5500 matrices.
const MAX_PATTERNS: usize = 1 << 14;
/// Bytes of a compiled pattern.
const MAX_PATTERN_SIZE: usize = 1 << 18;

/// An adapter, by the names of the matrices that it changes.
#[derive(Debug)]
pub(crate) struct Adapter {
    path: PathBuf,
    /// The model that it was made for, as PEFT names it.
    pub(crate) base_model: Option<String>,
    deltas: BTreeMap<String, Delta>,
}

/// `scale · up · down` is added to a matrix.
#[derive(Debug)]
pub(crate) struct Delta {
    /// `lora_A`, `[rank, inputs]`.
    pub(crate) down: Vec<f32>,
    /// `lora_B`, `[outputs, rank]`.
    pub(crate) up: Vec<f32>,
    inputs: usize,
    outputs: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

impl Adapter {
    /// Reads the adapter in the directory `path`, or of that id on a hub.
    ///
    /// # Errors
    /// `NotFound`, `InvalidFile` and `Unsupported` for its files. Pickles (`adapter_model.bin`) are not
    /// read: they can run code.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let path = &adapter_directory(path)?;
        let directory = Directory::open(path)?;
        let config = Config::read(&directory)?;
        let shown = path.join(WEIGHTS);
        let Some(real) = directory.file(WEIGHTS)? else {
            let pickle = directory.file("adapter_model.bin")?.is_some();
            let help = match pickle {
                true => "save it with safe_serialization=True: pickle files are not read",
                false => "is this the directory of a PEFT adapter?",
            };
            return Err(Error::new(ErrorKind::NotFound, "no such file")
                .with_path(shown)
                .with_help(help));
        };
        let pairs = paired(halves(&real, &shown, &config)?, &shown)?;
        let ranks = pairs.iter();
        let ranks = ranks.map(|(module, (down, _))| (module.as_str(), down.rows));
        let scales = config.scales(&ranks.collect())?;
        let scales: Vec<f32> = scales.into_values().collect();
        // Both maps are in the order of the names.
        let deltas = pairs.into_iter().zip(scales);
        let deltas = deltas.map(|((module, (down, up)), scale)| {
            let delta = Delta {
                inputs: down.cols,
                outputs: up.rows,
                rank: down.rows,
                down: down.numbers,
                up: up.numbers,
                scale,
            };
            (format!("{module}.weight"), delta)
        });
        let base_model = config.fields.get("base_model_name_or_path");
        Ok(Self {
            path: path.to_owned(),
            base_model: base_model.and_then(Value::as_str).map(str::to_owned),
            deltas: deltas.collect(),
        })
    }

    /// Checks that the adapter is for these matrices.
    ///
    /// # Errors
    /// `InvalidFile` for a matrix that the model does not have, or has in another shape.
    pub(crate) fn check(&self, shapes: &[(String, Vec<usize>)]) -> Result<()> {
        for (name, delta) in &self.deltas {
            let shape = shapes.iter().find(|(known, _)| known == name);
            let Some((_, shape)) = shape else {
                return Err(
                    Error::new(ErrorKind::InvalidFile, "adapter is for another model")
                        .with_path(&self.path)
                        .with_key(one_line(name))
                        .with_why("the model has no such matrix")
                        .with_help("give the model that the adapter was trained on"),
                );
            };
            if *shape != [delta.outputs, delta.inputs] {
                let found = [delta.outputs, delta.inputs];
                let error = wrong_shape(&self.path, name, &format!("{shape:?}"), &found);
                return Err(error.with_help("give the model that the adapter was trained on"));
            }
        }
        Ok(())
    }

    /// What is added to the matrix `name`.
    pub(crate) fn delta(&self, name: &str) -> Option<&Delta> {
        self.deltas.get(name)
    }

    /// The matrices that it changes, with its rank and scale there.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = (&str, usize, f32)> {
        let deltas = self.deltas.iter();
        deltas.map(|(name, delta)| (name.as_str(), delta.rank, delta.scale))
    }

    /// Bytes of its matrices in f32.
    pub(crate) fn bytes(&self) -> u64 {
        let numbers = self
            .deltas
            .values()
            .map(|delta| delta.down.len() + delta.up.len());
        4 * numbers.sum::<usize>() as u64
    }

    /// Checks that it does not change the tensor `name`.
    ///
    /// # Errors
    /// `Unsupported` if it does.
    pub(crate) fn refuse(&self, name: &str) -> Result<()> {
        if !self.changes(name) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            "matrix cannot have an adapter beside it",
        )
        .with_path(&self.path)
        .with_key(name)
        .with_help("add the adapter while loading, or merge it"))
    }

    /// Whether a tensor of this name changes.
    pub(crate) fn changes(&self, name: &str) -> bool {
        self.deltas.contains_key(name)
    }

    /// Adds the adapter to row `index` of the matrix `name`.
    pub(crate) fn add(&self, name: &str, index: usize, row: &mut [f32]) {
        let Some(delta) = self.deltas.get(name) else {
            return;
        };
        let up = &delta.up[index * delta.rank..][..delta.rank];
        let downs = delta.down.chunks_exact(delta.inputs);
        let mut sum = vec![0.0; row.len()];
        for (up, down) in up.iter().zip(downs) {
            for (sum, down) in sum.iter_mut().zip(down) {
                *sum += up * down;
            }
        }
        for (row, sum) in row.iter_mut().zip(sum) {
            *row += delta.scale * sum;
        }
    }
}

struct Half {
    name: String,
    rows: usize,
    cols: usize,
    numbers: Vec<f32>,
}

/// `lora_A` and `lora_B` by module.
type Halves = BTreeMap<String, [Option<Half>; 2]>;

/// The tensors of the file at `real`, `shown` in errors.
fn halves(real: &Path, shown: &Path, config: &Config) -> Result<Halves> {
    let mapped = mmap::map(real, shown)?;
    let mut halves = Halves::new();
    for entry in safetensors::entries(&mapped.bytes, shown, Extra::Nothing)? {
        let Some((module, which)) = module(&entry.name) else {
            return Err(config.unsupported(
                "tensor of an adapter is not supported",
                &entry.name,
                "lora_A and lora_B of projections are read",
            ));
        };
        let &[rows, cols] = entry.shape.as_slice() else {
            let shape = &entry.shape;
            return Err(wrong_shape(shown, &entry.name, "two dimensions", shape));
        };
        let half = Half {
            rows,
            cols,
            numbers: numbers(&mapped.bytes[entry.range.clone()], entry.encoding),
            name: entry.name,
        };
        if let Some(twice) = halves.entry(module).or_default()[which].replace(half) {
            return Err(Error::new(ErrorKind::InvalidFile, "tensor is stored twice")
                .with_path(shown)
                .with_key(one_line(&twice.name))
                .with_help("save the adapter again with PEFT"));
        }
    }
    Ok(halves)
}

/// Both halves of every matrix, of one rank.
fn paired(halves: Halves, shown: &Path) -> Result<BTreeMap<String, (Half, Half)>> {
    let mut pairs = BTreeMap::new();
    for (module, halves) in halves {
        let [Some(down), Some(up)] = halves else {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                "half of an adapter's matrix is missing",
            )
            .with_path(shown)
            .with_key(one_line(&module))
            .with_help("the file is not whole: save the adapter again"));
        };
        if up.cols != down.rows || down.rows == 0 {
            let expected = match down.rows {
                0 => "a rank above 0".to_owned(),
                rank => format!("[outputs, {rank}]"),
            };
            let found = &[up.rows, up.cols];
            return Err(wrong_shape(shown, &up.name, &expected, found));
        }
        pairs.insert(module, (down, up));
    }
    Ok(pairs)
}

/// The module of a tensor, and whether it is `lora_A` (0) or `lora_B` (1).
fn module(name: &str) -> Option<(String, usize)> {
    let rest = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    // Old versions have the adapter's name behind.
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    for (suffix, which) in [(".lora_A", 0), (".lora_B", 1)] {
        if let Some(module) = rest.strip_suffix(suffix) {
            return Some((module.to_owned(), which));
        }
    }
    None
}

fn numbers(bytes: &[u8], encoding: Encoding) -> Vec<f32> {
    let halves = |to: fn([u8; 2]) -> f32| bytes.as_chunks::<2>().0.iter().map(|x| to(*x)).collect();
    match encoding {
        Encoding::Numbers(DType::F16) => halves(|x| half::f16::from_le_bytes(x).to_f32()),
        Encoding::Numbers(DType::BF16) => halves(|x| half::bf16::from_le_bytes(x).to_f32()),
        _ => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|x| f32::from_le_bytes(*x))
            .collect(),
    }
}

fn wrong_shape(path: &Path, name: &str, expected: &str, found: &[usize]) -> Error {
    Error::new(ErrorKind::InvalidFile, "tensor has the wrong shape")
        .with_path(path)
        .with_key(one_line(name))
        .with_why(format!("expected {expected}, found {found:?}"))
        .with_help("save the adapter again with PEFT")
}

/// `adapter_config.json`.
struct Config {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl Config {
    fn read(directory: &Directory) -> Result<Self> {
        let path = directory.path().join(CONFIG);
        let Some(bytes) = directory.read(CONFIG, MAX_CONFIG)? else {
            return Err(Error::new(ErrorKind::NotFound, "no such file")
                .with_path(path)
                .with_help("is this the directory of a PEFT adapter?"));
        };
        let fields = serde_json::from_slice(&bytes).map_err(|error| {
            Error::new(ErrorKind::InvalidFile, "file is not valid JSON")
                .with_path(&path)
                .with_why(json_why(&error))
                .with_source(error)
                .with_help("save the adapter again with PEFT")
        })?;
        let config = Self { path, fields };
        config.refuse_what_is_not_done()?;
        Ok(config)
    }

    fn refuse_what_is_not_done(&self) -> Result<()> {
        let kind = self.fields.get("peft_type").and_then(Value::as_str);
        if kind != Some("LORA") {
            return Err(self.unsupported("adapter is not a LoRA", "peft_type", "LORA is read"));
        }
        let kinds = [
            "use_dora",
            "use_qalora",
            "use_bdlora",
            "fan_in_fan_out",
            "lora_bias",
            "layer_replication",
            "alora_invocation_tokens",
            "trainable_token_indices",
        ];
        for key in kinds {
            let is_off = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
            if self.fields.get(key).is_some_and(|value| !is_off(value)) {
                return Err(self.unsupported(
                    "kind of LoRA is not supported",
                    key,
                    "train without it",
                ));
            }
        }
        let bias = self.fields.get("bias").and_then(Value::as_str);
        if bias.is_some_and(|bias| bias != "none") {
            return Err(self.unsupported("kind of LoRA is not supported", "bias", "none is read"));
        }
        let modules = self.fields.get("modules_to_save").and_then(Value::as_array);
        if modules.is_some_and(|modules| !modules.is_empty()) {
            let help = "merge the adapter with PEFT";
            return Err(self.unsupported("whole modules are not read", "modules_to_save", help));
        }
        Ok(())
    }

    fn unsupported(&self, what: &str, key: &str, help: &str) -> Error {
        Error::new(ErrorKind::Unsupported, what)
            .with_path(&self.path)
            .with_key(one_line(key))
            .with_help(help)
    }

    fn invalid(&self, key: &str, why: String) -> Error {
        Error::new(ErrorKind::InvalidFile, "invalid adapter config")
            .with_path(&self.path)
            .with_key(key)
            .with_why(why)
            .with_help("save the adapter again with PEFT")
    }

    /// `lora_alpha / r`, or with `use_rslora` `lora_alpha / √r` (arXiv:2312.03732), of modules with their
    /// ranks.
    fn scales<'m>(&self, modules: &BTreeMap<&'m str, usize>) -> Result<BTreeMap<&'m str, f32>> {
        let ranks = self.numbers("rank_pattern", "r", modules)?;
        let alphas = self.numbers("alpha_pattern", "lora_alpha", modules)?;
        let rslora = self.fields.get("use_rslora").and_then(Value::as_bool);
        let mut scales = BTreeMap::new();
        for (module, rank) in modules {
            let (told, rank) = (ranks[module], *rank as f64);
            if told != rank {
                let module = one_line(module);
                let why = format!("{told}, but the tensors of {module} have {rank}");
                return Err(self.invalid("r", why));
            }
            let divisor = match rslora {
                Some(true) => rank.sqrt(),
                _ => rank,
            };
            let scale = (alphas[module] / divisor) as f32;
            if !scale.is_finite() {
                let why = format!("{} is too large", alphas[module]);
                return Err(self.invalid("lora_alpha", why));
            }
            scales.insert(*module, scale);
        }
        Ok(scales)
    }

    /// What the first pattern that fits a module says of it, else what holds for all.
    fn numbers<'m>(
        &self,
        table: &str,
        key: &str,
        modules: &BTreeMap<&'m str, usize>,
    ) -> Result<BTreeMap<&'m str, f64>> {
        let patterns = self.fields.get(table).and_then(Value::as_object);
        if patterns.is_some_and(|patterns| patterns.len() > MAX_PATTERNS) {
            return Err(self.invalid(table, format!("more than {MAX_PATTERNS} patterns")));
        }
        let mut left: Vec<&str> = modules.keys().copied().collect();
        let mut numbers = BTreeMap::new();
        // Each is compiled once: one after the other, as each may take some memory.
        for (pattern, value) in patterns.into_iter().flatten() {
            let name = self.name_pattern(table, pattern)?;
            let number = self.number(table, Some(value))?;
            left.retain(|module| {
                let fits = name.is_match(module.as_bytes());
                if fits {
                    numbers.insert(*module, number);
                }
                !fits
            });
        }
        if !left.is_empty() {
            let number = self.number(key, self.fields.get(key))?;
            numbers.extend(left.into_iter().map(|module| (module, number)));
        }
        Ok(numbers)
    }

    /// As PEFT: the name's end, or a regular expression for it. Names of modules are ASCII.
    fn name_pattern(&self, table: &str, pattern: &str) -> Result<Regex> {
        RegexBuilder::new(&format!(r"^(.*\.)?({pattern})$"))
            .unicode(false)
            .size_limit(MAX_PATTERN_SIZE)
            .build()
            .map_err(|error| {
                let invalid = self.invalid(table, one_line(pattern));
                invalid.with_source(error)
            })
    }

    fn number(&self, key: &str, value: Option<&Value>) -> Result<f64> {
        let number = value
            .and_then(Value::as_f64)
            .filter(|number| number.is_finite());
        number.ok_or_else(|| self.invalid(key, "not a number".to_owned()))
    }
}
