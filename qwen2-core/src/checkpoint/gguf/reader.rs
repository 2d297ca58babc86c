//! The header of a GGUF file → its metadata and tensors, every number bounded by the file's size.
//!
//! The format is that of ggml's `gguf.md`, versions 2 and 3, little-endian. Nothing is copied but names:
//! values are places in the file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::blocks::Kind;
use crate::config::one_line;
use crate::error::{Error, ErrorKind, Result};

const MAGIC: &[u8; 4] = b"GGUF";
/// The 57B model has some 400 tensors and 30 keys.
const MAX_TENSORS: u64 = 1 << 16;
const MAX_KEYS: u64 = 1 << 16;
/// Twice the vocabulary of any Qwen model.
const MAX_STRINGS: u64 = 1 << 20;
/// The format's own limit of a key.
const MAX_NAME: u64 = 65_535;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 16;
const MAX_RANK: u32 = 4;

/// A file's header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<Tensor>,
}

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    /// UTF-8 at this place of the file.
    Text(Range<usize>),
    /// Strings, each with its length in front.
    Texts(usize, Range<usize>),
    /// 32-bit integers.
    Integers(Range<usize>),
    /// An array that we have no use for.
    Other,
}

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) name: String,
    /// Row-major, the longest stride first: the file's dimensions the other way round.
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
    /// Its bytes, counted from the start of the file.
    pub(super) range: Range<usize>,
}

/// Reads the header of `file`; `path` is only named in errors.
///
/// # Errors
/// `InvalidFile` for whatever breaks the format, `Unsupported` for other versions, big-endian files and
/// unknown types of tensors. Each names the file and, where one is concerned, the key or the tensor.
pub(super) fn read(file: &[u8], path: &Path) -> Result<Header> {
    let mut cursor = Cursor { file, at: 0, path };
    if cursor.take(4).ok() != Some(MAGIC) {
        return Err(cursor.broken("it does not begin with GGUF"));
    }
    check_version(cursor.u32()?, path)?;
    let n_tensors = cursor.count("tensors", MAX_TENSORS)?;
    let n_keys = cursor.count("keys", MAX_KEYS)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..n_keys {
        let key = cursor.name("key")?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(cursor
                .broken("the key is there twice")
                .with_key(one_line(&key)));
        }
    }
    let alignment = alignment(&metadata, &cursor)?;
    let infos = (0..n_tensors).map(|_| cursor.tensor_info());
    let infos = infos.collect::<Result<Vec<_>>>()?;
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let mut tensors = infos
        .into_iter()
        .map(|info| place(info, start, alignment, &cursor))
        .collect::<Result<Vec<_>>>()?;
    check_overlap(&mut tensors, &cursor)?;
    Ok(Header { metadata, tensors })
}

fn check_version(version: u32, path: &Path) -> Result<()> {
    if version == 2 || version == 3 {
        return Ok(());
    }
    let why = match version.swap_bytes() {
        2 | 3 => "the file is big-endian".to_owned(),
        _ => format!("version {version}, versions 2 and 3 are read"),
    };
    Err(
        Error::new(ErrorKind::Unsupported, "GGUF of another version")
            .with_path(path)
            .with_why(why)
            .with_help("convert the checkpoint again with a current llama.cpp"),
    )
}

fn alignment(metadata: &BTreeMap<String, Value>, cursor: &Cursor<'_>) -> Result<u64> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let bytes = match value {
        Value::Integer(bytes) => u64::try_from(*bytes).ok(),
        _ => None,
    };
    bytes
        .filter(|bytes| bytes.is_power_of_two() && *bytes <= MAX_ALIGNMENT)
        .ok_or_else(|| {
            cursor
                .broken("not a power of two up to 65536")
                .with_key(KEY)
        })
}

struct Info {
    name: String,
    shape: Vec<usize>,
    elements: usize,
    kind: Kind,
    offset: u64,
}

fn place(info: Info, start: u64, alignment: u64, cursor: &Cursor<'_>) -> Result<Tensor> {
    let broken = |why: String| cursor.broken(&why).with_key(one_line(&info.name));
    let (block, bytes) = info.kind.block();
    let row = info.shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        return Err(broken(format!(
            "rows of {row} numbers are no whole blocks of {block}"
        )));
    }
    if !info.offset.is_multiple_of(alignment) {
        return Err(broken(format!(
            "it begins at {}, which is no multiple of {alignment}",
            info.offset
        )));
    }
    let len = (info.elements / block).checked_mul(bytes);
    let first = start
        .checked_add(info.offset)
        .and_then(|first| usize::try_from(first).ok());
    let range = first.zip(len).and_then(|(first, len)| {
        let end = first.checked_add(len)?;
        (end <= cursor.file.len()).then_some(first..end)
    });
    let Some(range) = range else {
        return Err(broken(format!(
            "it ends behind the file's {} bytes",
            cursor.file.len()
        ))
        .with_help("the download was cut off: fetch the file again"));
    };
    Ok(Tensor {
        name: info.name,
        shape: info.shape,
        kind: info.kind,
        range,
    })
}

fn check_overlap(tensors: &mut [Tensor], cursor: &Cursor<'_>) -> Result<()> {
    tensors.sort_by_key(|tensor| tensor.range.start);
    for pair in tensors.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            let why = format!("its bytes are those of {} as well", one_line(&pair[0].name));
            return Err(cursor.broken(&why).with_key(one_line(&pair[1].name)));
        }
    }
    let mut names: Vec<_> = tensors.iter().map(|tensor| &tensor.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(cursor
            .broken("the tensor is there twice")
            .with_key(one_line(pair[0]))),
        None => Ok(()),
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Cursor<'a> {
    fn broken(&self, why: &str) -> Error {
        Error::new(ErrorKind::InvalidFile, "not a valid GGUF file")
            .with_path(self.path)
            .with_why(why)
            .with_help("fetch the file again, or convert the checkpoint again")
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let left = &self.file[self.at..];
        let Some(bytes) = left.get(..n) else {
            return Err(self.broken(&format!("the header is cut off at byte {}", self.at)));
        };
        self.at += n;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, most: u64) -> Result<u64> {
        let n = self.u64()?;
        if n > most {
            return Err(self.broken(&format!("{n} {what}, at most {most} are read")));
        }
        Ok(n)
    }

    /// The place of a string.
    fn text(&mut self) -> Result<Range<usize>> {
        let len = self.u64()?;
        let start = self.at;
        // What does not fit an address does not fit the file either.
        self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        Ok(start..self.at)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let range = self.text()?;
        let bytes = &self.file[range];
        let name = std::str::from_utf8(bytes).ok();
        match name.filter(|name| !name.is_empty() && name.len() as u64 <= MAX_NAME) {
            Some(name) => Ok(name.to_owned()),
            None => Err(self.broken(&format!(
                "a {what} before byte {} is empty, too long or not UTF-8",
                self.at
            ))),
        }
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(self.array::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => return self.values(key),
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => {
                let why = format!("a value of the unknown type {other}");
                return Err(self.broken(&why).with_key(one_line(key)));
            }
        })
    }

    fn values(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32()?;
        let n = self.u64()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 if n <= MAX_STRINGS => {
                let start = self.at;
                for _ in 0..n {
                    self.text()?;
                }
                return Ok(Value::Texts(n as usize, start..self.at));
            }
            8 => {
                let why = format!("{n} strings, at most {MAX_STRINGS} are read");
                return Err(self.broken(&why).with_key(one_line(key)));
            }
            9 => return Err(self.broken("a list of lists").with_key(one_line(key))),
            other => {
                let why = format!("a list of the unknown type {other}");
                return Err(self.broken(&why).with_key(one_line(key)));
            }
        };
        let start = self.at;
        let len = usize::try_from(n).ok().and_then(|n| n.checked_mul(size));
        self.take(len.unwrap_or(usize::MAX))?;
        Ok(match kind {
            4 | 5 => Value::Integers(start..self.at),
            _ => Value::Other,
        })
    }

    fn tensor_info(&mut self) -> Result<Info> {
        let name = self.name("tensor's name")?;
        let rank = self.u32()?;
        if !(1..=MAX_RANK).contains(&rank) {
            let why = format!("{rank} dimensions, 1 to {MAX_RANK} are read");
            return Err(self.broken(&why).with_key(one_line(&name)));
        }
        let mut dims = (0..rank).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        dims.reverse();
        let product = dims.iter().try_fold(1_usize, |product, dim| {
            product.checked_mul(usize::try_from(*dim).ok()?)
        });
        // A number takes a quarter of a byte at least.
        let most = self.file.len().saturating_mul(4);
        let Some(elements) = product.filter(|n| (1..=most).contains(n)) else {
            let why = format!("the dimensions {dims:?} do not fit the file");
            return Err(self.broken(&why).with_key(one_line(&name)));
        };
        let id = self.u32()?;
        let Some(kind) = Kind::from_id(id) else {
            return Err(
                Error::new(ErrorKind::Unsupported, "tensor type is not supported")
                    .with_path(self.path)
                    .with_key(one_line(&name))
                    .with_why(format!("ggml type {id}"))
                    .with_help(
                        "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K and IQ4_NL are read",
                    ),
            );
        };
        Ok(Info {
            name,
            shape: dims.into_iter().map(|dim| dim as usize).collect(),
            elements,
            kind,
            offset: self.u64()?,
        })
    }
}

/// The strings of [`Value::Texts`]; `None` for one that is not UTF-8.
pub(super) fn texts(
    file: &[u8],
    n: usize,
    range: Range<usize>,
) -> impl Iterator<Item = Option<&str>> {
    let mut rest = &file[range];
    (0..n).map(move |_| {
        let (len, behind) = rest.split_first_chunk()?;
        let (text, behind) = behind.split_at_checked(u64::from_le_bytes(*len) as usize)?;
        rest = behind;
        std::str::from_utf8(text).ok()
    })
}
