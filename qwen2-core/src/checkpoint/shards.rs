//! The weight files of a checkpoint, one or many, as tensors by name.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Deserialize;

use super::directory::Directory;
use super::join::GroupPlaces;
use super::mmap::{self, Mapped};
use super::safetensors::{self, Extra};
use super::{Encoding, StoredTensor};
use crate::config::{DType, json_why, one_line};
use crate::error::{Error, ErrorKind, Result};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// The index of the 57B model has half a megabyte.
const MAX_INDEX: u64 = 64 << 20;
/// Names that one message lists.
pub(super) const MAX_LISTED: usize = 8;

/// Every stored tensor; the bytes stay in the mapped files.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) files: Vec<Shard>,
    pub(super) tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    mapped: Mapped,
}

/// Where a tensor is.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) shard: usize,
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
    /// Of a matrix in groups, the rest of it.
    pub(super) groups: Option<Box<GroupPlaces>>,
}

impl Weights {
    /// No tensors, of no file.
    pub(super) fn empty() -> Self {
        Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// Maps the weight files of `directory` and reads their headers; `extra`: what matrices may be
    /// beside numbers. Where both forms are there, the single file is taken, as by transformers.
    ///
    /// # Errors
    /// `NotFound` where files are missing, `InvalidFile` and `Unsupported` for what they hold.
    pub(super) fn open(directory: &Directory, extra: Extra) -> Result<Self> {
        let mut weights = Self::empty();
        if let Some(real) = directory.file(SINGLE)? {
            weights.add(directory, SINGLE, &real, extra)?;
            return Ok(weights);
        }
        let Some(index) = directory.read(INDEX, MAX_INDEX)? else {
            return Err(Error::new(ErrorKind::NotFound, "no weights")
                .with_path(directory.path())
                .with_why(format!("neither {SINGLE} nor {INDEX} is there"))
                .with_help(
                    "download the checkpoint's safetensors files (pytorch_model.bin is not read)",
                ));
        };
        let index_path = directory.path().join(INDEX);
        let weight_map = parse_index(&index, &index_path)?;
        for (name, real) in present_shards(directory, &weight_map)? {
            weights.add(directory, name, &real, extra)?;
        }
        weights.check_index(directory.path(), &weight_map)?;
        Ok(weights)
    }

    fn add(&mut self, directory: &Directory, name: &str, real: &Path, extra: Extra) -> Result<()> {
        let path = directory.path().join(name);
        let mapped = mmap::map(real, &path)?;
        let entries = safetensors::entries(&mapped.bytes, &path, extra)?;
        self.add_entries(path, mapped, entries)
    }

    /// Adds the tensors of one file.
    ///
    /// # Errors
    /// `InvalidFile` if another file has one of them.
    pub(super) fn add_entries(
        &mut self,
        path: PathBuf,
        mapped: Mapped,
        entries: Vec<safetensors::Entry>,
    ) -> Result<()> {
        let shard = self.files.len();
        for entry in entries {
            let safetensors::Entry {
                name,
                encoding,
                shape,
                range,
            } = entry;
            if let Some(other) = self.tensors.get(&name) {
                let other = file_name(&self.files[other.shard].path);
                return Err(Error::new(ErrorKind::InvalidFile, "tensor is stored twice")
                    .with_path(path)
                    .with_key(one_line(&name))
                    .with_why(format!("{other} has it as well"))
                    .with_help("the shards are from different revisions: download them again"));
            }
            self.tensors.insert(
                name,
                Place {
                    shard,
                    encoding,
                    shape,
                    range,
                    groups: None,
                },
            );
        }
        self.files.push(Shard { path, mapped });
        Ok(())
    }

    /// What the index promises must be where it says.
    fn check_index(&self, directory: &Path, weight_map: &BTreeMap<String, String>) -> Result<()> {
        for (name, shard) in weight_map {
            let found = self
                .tensors
                .get(name)
                .map(|place| file_name(&self.files[place.shard].path));
            if found.as_ref() != Some(shard) {
                let error = Error::new(ErrorKind::InvalidFile, "tensor is not in its shard")
                    .with_path(directory.join(shard))
                    .with_key(one_line(name))
                    .with_help("the shards are from different revisions: download them again");
                return Err(match found {
                    Some(other) => error.with_why(format!("{other} has it")),
                    None => error.with_why("no shard has it"),
                });
            }
        }
        Ok(())
    }

    /// The tensor's bytes, shared with the map and aligned to its numbers.
    pub(super) fn tensor(&self, name: &str) -> Option<StoredTensor> {
        let place = self.tensors.get(name)?;
        Some(StoredTensor {
            encoding: place.encoding,
            shape: place.shape.clone(),
            bytes: aligned(self.bytes_of(place), place.encoding.size_in_bytes()),
            groups: self.groups_at(place),
        })
    }

    /// The bytes at a place.
    pub(super) fn bytes_of(&self, place: &Place) -> Bytes {
        self.files[place.shard]
            .mapped
            .bytes
            .slice(place.range.clone())
    }

    /// The file that a place is in.
    pub(super) fn path_of(&self, place: &Place) -> &Path {
        &self.files[place.shard].path
    }

    /// The tensor's bytes in the file are done with.
    pub(super) fn release(&self, name: &str) {
        if let Some(place) = self.tensors.get(name) {
            self.files[place.shard].mapped.release(place.range.clone());
        }
    }

    /// Names, encodings and shapes, with the file of each, in the order of the names.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Encoding, &[usize], &Path)> {
        self.tensors.iter().map(|(name, place)| {
            (
                name.as_str(),
                place.encoding,
                place.shape.as_slice(),
                self.files[place.shard].path.as_path(),
            )
        })
    }

    /// The layers that have a tensor whose name ends so.
    pub(super) fn layers_with(&self, suffix: &str) -> Vec<usize> {
        let layer = |name: &String| {
            let name = name.strip_prefix("model.layers.")?.strip_suffix(suffix)?;
            name.parse().ok()
        };
        self.tensors.keys().filter_map(layer).collect()
    }

    /// Whether a tensor is stored in blocks.
    pub(super) fn has_blocks(&self) -> bool {
        let mut places = self.tensors.values();
        places.any(|place| matches!(place.encoding, Encoding::Blocks(_) | Encoding::Grouped))
    }

    /// Bytes of all tensors.
    pub(super) fn total_bytes(&self) -> u64 {
        self.tensors
            .values()
            .map(|place| match self.groups_at(place) {
                Some(groups) => groups.stored_bytes(),
                None => place.range.len() as u64,
            })
            .sum()
    }

    /// The precision that most of the bytes are in.
    pub(super) fn dtype(&self) -> Option<DType> {
        let bytes_of = |dtype: &DType| -> usize {
            let kind = Encoding::Numbers(*dtype);
            let same = self.tensors.values().filter(|place| place.encoding == kind);
            same.map(|place| place.range.len()).sum()
        };
        let used = [DType::F32, DType::F16, DType::BF16]
            .into_iter()
            .filter(|dtype| bytes_of(dtype) > 0);
        used.max_by_key(bytes_of)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Tensor name → file name, each a plain name in the directory of the index.
///
/// # Errors
/// `InvalidFile` for text that is not such an index, and for names that lead elsewhere.
pub(super) fn parse_index(index: &[u8], path: &Path) -> Result<BTreeMap<String, String>> {
    let invalid = |what: &str| {
        let help = "the index is damaged: download it again";
        Error::new(ErrorKind::InvalidFile, what)
            .with_path(path)
            .with_help(help)
    };
    let index: Index = serde_json::from_slice(index).map_err(|error| {
        invalid("file is not a valid index")
            .with_why(json_why(&error))
            .with_source(error)
    })?;
    if index.weight_map.is_empty() {
        return Err(invalid("index names no tensor").with_key("weight_map"));
    }
    for (name, file) in &index.weight_map {
        if !is_plain_name(file) {
            return Err(invalid("index names a file outside of the directory")
                .with_key(one_line(name))
                .with_why(one_line(file))
                .with_help("do not use this checkpoint: shards lie beside the index"));
        }
    }
    Ok(index.weight_map)
}

/// Letters, digits, `.`, `-` and `_`, not starting with a dot: no separator of any system, no
/// drive, no stream, no parent.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (1..=255).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
}

/// The shards with their real paths, all of them.
fn present_shards<'a>(
    directory: &Directory,
    weight_map: &'a BTreeMap<String, String>,
) -> Result<Vec<(&'a str, PathBuf)>> {
    let names: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let mut present = Vec::new();
    let mut missing = Vec::new();
    for name in &names {
        match directory.file(name)? {
            Some(real) => present.push((*name, real)),
            None => missing.push(*name),
        }
    }
    let Some(first) = missing.first() else {
        return Ok(present);
    };
    let tensor = weight_map
        .iter()
        .find(|(_, file)| file == first)
        .map_or("", |(name, _)| name);
    let help = match missing.len() {
        1 => format!("{first} is missing, download it again"),
        _ => format!("{} are missing, download them again", listed(&missing)),
    };
    Err(Error::new(
        ErrorKind::NotFound,
        format!("no tensor named {}", one_line(tensor)),
    )
    .with_path(directory.path())
    .with_why(format!("{} of {} shards found", present.len(), names.len()))
    .with_help(help))
}

/// The first names, and how many more there are.
pub(super) fn listed(names: &[&str]) -> String {
    listed_of(names, names.len())
}

/// The first names of `count`, and how many more there are.
pub(super) fn listed_of(names: &[&str], count: usize) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(MAX_LISTED)
        .map(|name| one_line(name))
        .collect();
    let shown = shown.join(", ");
    match count.checked_sub(MAX_LISTED + 1) {
        Some(more) => format!("{shown} and {} more", more + 1),
        None => shown,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// The bytes themselves where they lie on a multiple of their number's size, else an aligned copy:
/// the format pads its header only by convention.
pub(crate) fn aligned(bytes: Bytes, size: usize) -> Bytes {
    if bytes.as_ptr().align_offset(size) == 0 {
        return bytes;
    }
    let mut words = vec![0_u64; bytes.len().div_ceil(size_of::<u64>())];
    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
    Bytes::from_owner(Words(words)).slice(..bytes.len())
}

struct Words(Vec<u64>);

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_off_their_alignment_are_copied_and_others_are_not() {
        let words = Bytes::from_owner(Words((0..8).collect()));
        let on = aligned(words.slice(4..20), 4);
        assert_eq!(on.as_ptr(), words[4..].as_ptr());
        let off = aligned(words.slice(7..30), 4);
        assert_eq!(off.as_ptr().align_offset(4), 0);
        assert_eq!(off, words.slice(7..30));
    }

    #[test]
    fn only_plain_names_are_shards() {
        for name in ["model-00001-of-00004.safetensors", "a"] {
            assert!(is_plain_name(name));
        }
        for name in [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            "a\\b",
            "C:x",
            "a\0b",
            ".hidden",
        ] {
            assert!(!is_plain_name(name), "{name}");
        }
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(listed(&["a", "b"]), "a, b");
        assert_eq!(listed(&["x"; 8]), "x, x, x, x, x, x, x, x");
        assert_eq!(listed(&["x"; 10]), "x, x, x, x, x, x, x, x and 2 more");
    }
}
