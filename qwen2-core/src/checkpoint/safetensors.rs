//! The header of a safetensors file → its tensors, every number bounded by the file's size.
//!
//! Our own reader and not the `safetensors` crate's, because that one does not name the tensor in
//! its errors and keeps the last of two tensors of one name; the crate is the oracle in the tests.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer as _, MapAccess, Visitor};

use super::Encoding;
use crate::config::{DType, json_why, one_line};
use crate::error::{Error, ErrorKind, Result};

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes that hold the header's length.
const LENGTH: usize = 8;
/// No tensor of these models has more than 2; the bound keeps messages short.
const MAX_RANK: usize = 8;

/// What a file may hold beside numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extra {
    Nothing,
    /// Panels of bytes.
    Packed,
    /// 32-bit words.
    Words,
}

/// One tensor of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub(super) range: Range<usize>,
}

/// The tensors of `file` in the order of their bytes; `path` is only named in errors. `extra` is what
/// the checkpoint's config announces.
///
/// # Errors
/// `InvalidFile` for whatever breaks the format, `Unsupported` for numbers that are not float32,
/// float16 or bfloat16. Each names the file and, where one is concerned, the tensor.
pub(super) fn entries(file: &[u8], path: &Path, extra: Extra) -> Result<Vec<Entry>> {
    let (header, start) = header(file, path)?;
    let mut stored = parse(header, path)?;
    stored.sort_by_key(|(_, tensor)| tensor.data_offsets);
    check_coverage(&stored, (file.len() - start) as u64, path)?;
    stored
        .into_iter()
        .map(|(name, tensor)| entry(name, &tensor, start, path, extra))
        .collect()
}

/// What the header says of one tensor; unknown keys are ignored, as by the format's own reader.
#[derive(Deserialize)]
struct Stored {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The JSON text and where the tensors' bytes start.
fn header<'a>(file: &'a [u8], path: &Path) -> Result<(&'a [u8], usize)> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH>() else {
        let error = if file.is_empty() {
            damaged("file is empty", path)
        } else {
            damaged("file is truncated", path).with_why(format!("only {} bytes", file.len()))
        };
        return Err(error);
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(damaged("header is too long", path)
            .with_why(format!("{length} bytes, at most {MAX_HEADER} are allowed")));
    }
    match rest.get(..length as usize) {
        Some(header) => Ok((header, LENGTH + header.len())),
        None => Err(damaged("header is longer than the file", path)
            .with_why(format!("{length} bytes in a file of {}", file.len()))),
    }
}

fn parse(header: &[u8], path: &Path) -> Result<Vec<(String, Stored)>> {
    let text = std::str::from_utf8(header).map_err(|error| {
        damaged("header is not UTF-8", path).with_why(format!("byte {}", error.valid_up_to()))
    })?;
    let mut reader = HeaderReader {
        tensors: Vec::new(),
        current: None,
    };
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = json.deserialize_map(&mut reader).and_then(|()| json.end());
    if let Err(error) = outcome {
        let damaged = damaged("header is not valid", path)
            .with_why(json_why(&error))
            .with_source(error);
        return Err(match reader.current {
            Some(name) => damaged.with_key(one_line(&name)),
            None => damaged,
        });
    }
    let mut names: Vec<&str> = reader
        .tensors
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(damaged("tensor is stored twice", path).with_key(one_line(twice[0])));
    }
    Ok(reader.tensors)
}

/// Collects the tensors of the header; keeps the name it is at, for the error.
struct HeaderReader {
    tensors: Vec<(String, Stored)>,
    current: Option<String>,
}

impl<'de> Visitor<'de> for &mut HeaderReader {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                // Free text that changes nothing, for example {"format": "pt"}.
                map.next_value::<Option<BTreeMap<String, String>>>()?;
                continue;
            }
            self.current = Some(name);
            let tensor = map.next_value::<Stored>()?;
            if let Some(name) = self.current.take() {
                self.tensors.push((name, tensor));
            }
        }
        Ok(())
    }
}

/// The tensors, sorted by offset, must fill the `length` bytes without gap or overlap: a file that
/// is two things at once is how a checker and a loader come to read different weights.
fn check_coverage(stored: &[(String, Stored)], length: u64, path: &Path) -> Result<()> {
    let mut end = 0;
    for (name, tensor) in stored {
        let (from, to) = tensor.data_offsets;
        let at = |what| damaged(what, path).with_key(one_line(name));
        if from > to {
            return Err(at("tensor has impossible offsets").with_why(format!("[{from}, {to}]")));
        }
        if to > length {
            return Err(at("tensor reaches beyond the file")
                .with_why(format!("it ends at byte {to} of {length}")));
        }
        if from < end {
            return Err(at("tensors overlap").with_why(format!(
                "it starts at byte {from}, the one before ends at {end}"
            )));
        }
        if from > end {
            return Err(at("gap between tensors").with_why(format!(
                "it starts at byte {from}, the one before ends at {end}"
            )));
        }
        end = to;
    }
    if end < length {
        return Err(damaged("file has trailing bytes", path)
            .with_why(format!("{} behind the last tensor", length - end)));
    }
    Ok(())
}

/// Checks dtype and shape against the bytes; the offsets are checked already.
fn entry(name: String, stored: &Stored, start: usize, path: &Path, extra: Extra) -> Result<Entry> {
    let encoding = match stored.dtype.as_str() {
        "F32" => Encoding::Numbers(DType::F32),
        "F16" => Encoding::Numbers(DType::F16),
        "BF16" => Encoding::Numbers(DType::BF16),
        "U8" if extra == Extra::Packed => Encoding::Packed,
        "I32" if extra == Extra::Words => Encoding::Words,
        other => {
            let what = "dtype of a tensor is not supported";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .with_path(path)
                .with_key(one_line(&name))
                .with_why(one_line(other))
                .with_help("F32, F16 and BF16 are supported; is this a quantized checkpoint?"));
        }
    };
    let (from, to) = stored.data_offsets;
    let shape = shape(stored, encoding)
        .map_err(|(what, why)| damaged(what, path).with_key(one_line(&name)).with_why(why))?;
    let range = start + from as usize..start + to as usize;
    Ok(Entry {
        name,
        encoding,
        shape,
        range,
    })
}

/// The dimensions, if they take the bytes that are there; else what is wrong, and why.
fn shape(
    stored: &Stored,
    encoding: Encoding,
) -> std::result::Result<Vec<usize>, (&'static str, String)> {
    let impossible = |why| Err(("tensor has an impossible shape", why));
    let dims = &stored.shape;
    if dims.len() > MAX_RANK {
        return impossible(format!("{} dimensions", dims.len()));
    }
    let size = encoding.size_in_bytes() as u64;
    let Some(bytes) = dims.iter().try_fold(size, |n, dim| n.checked_mul(*dim)) else {
        return impossible(format!("{dims:?} overflows"));
    };
    let found = stored.data_offsets.1 - stored.data_offsets.0;
    if bytes != found {
        let why = format!("{dims:?} of {encoding} takes {bytes}, found {found}");
        return Err(("shape of a tensor does not fit its bytes", why));
    }
    // Beside a dimension of 0 another one may be anything, and usize has 32 bits on some machines.
    match dims.iter().map(|dim| usize::try_from(*dim)).collect() {
        Ok(shape) => Ok(shape),
        Err(_) => impossible(format!("{dims:?}")),
    }
}

fn damaged(what: &str, path: &Path) -> Error {
    Error::new(ErrorKind::InvalidFile, what)
        .with_path(path)
        .with_help("the file is damaged or its download is incomplete: download it again")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::SafeTensors;
    use safetensors::tensor::{Dtype, TensorView};

    use super::*;

    fn with_header(header: &str, data: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 0);
        file
    }

    fn read(file: &[u8]) -> Result<Vec<Entry>> {
        entries(file, Path::new("m.safetensors"), Extra::Nothing)
    }

    fn refusal(file: &[u8]) -> String {
        read(file).expect_err("refused").to_string()
    }

    /// Two tensors, written by the format's own crate.
    fn sample() -> Vec<u8> {
        let data = [7; 24];
        let tensors = [
            (
                "a",
                TensorView::new(Dtype::F32, vec![2, 2], &data[..16]).expect("view"),
            ),
            (
                "b.weight",
                TensorView::new(Dtype::BF16, vec![4], &data[16..]).expect("view"),
            ),
        ];
        let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(tensors, Some(metadata)).expect("serialize")
    }

    #[test]
    fn what_the_reference_writes_is_read_with_the_same_shapes_and_bytes() {
        let file = sample();
        let reference = SafeTensors::deserialize(&file).expect("reference");
        let entries = read(&file).expect("ours");
        assert_eq!(entries.len(), reference.len());
        for entry in entries {
            let tensor = reference.tensor(&entry.name).expect("name");
            assert_eq!(tensor.shape(), entry.shape);
            assert_eq!(tensor.data(), &file[entry.range.clone()]);
            assert_eq!(
                format!("{:?}", tensor.dtype()).to_lowercase(),
                entry.encoding.to_string()
            );
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let file = sample();
        for end in 0..file.len() {
            let error = read(&file[..end]).expect_err("truncated");
            assert_eq!(error.kind(), ErrorKind::InvalidFile, "{end}: {error}");
            assert!(error.help().is_some());
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        assert_eq!(refusal(b""), "file is empty: m.safetensors");
        assert_eq!(
            refusal(b"12345"),
            "file is truncated: m.safetensors: only 5 bytes"
        );
        let mut file = with_header("{}", 0);
        file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(
            refusal(&file)
                .starts_with("header is too long: m.safetensors: 18446744073709551615 bytes")
        );
        file[..8].copy_from_slice(&50_u64.to_le_bytes());
        assert_eq!(
            refusal(&file),
            "header is longer than the file: m.safetensors: 50 bytes in a file of 10"
        );
    }

    #[test]
    fn every_lie_of_the_header_is_refused_by_name() {
        let one = |tensor: &str| refusal(&with_header(&format!("{{\"t\":{tensor}}}"), 8));
        let cases = [
            (
                r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#,
                "tensor has impossible offsets: m.safetensors: t: [8, 0]",
            ),
            (
                r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#,
                "tensor reaches beyond the file: m.safetensors: t: it ends at byte 16 of 8",
            ),
            (
                r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#,
                "gap between tensors: m.safetensors: t: it starts at byte 4, the one before ends at 0",
            ),
            (
                r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
                "file has trailing bytes: m.safetensors: 4 behind the last tensor",
            ),
            (
                r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#,
                "shape of a tensor does not fit its bytes: m.safetensors: t: [3] of f32 takes 12, found 8",
            ),
            (
                r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#,
                "tensor has an impossible shape: m.safetensors: t: [4294967296, 4294967296] overflows",
            ),
            (
                r#"{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}"#,
                "tensor has an impossible shape: m.safetensors: t: 9 dimensions",
            ),
            (
                r#"{"dtype":"I64","shape":[1],"data_offsets":[0,8]}"#,
                "dtype of a tensor is not supported: m.safetensors: t: I64",
            ),
        ];
        for (tensor, message) in cases {
            assert_eq!(one(tensor), message);
        }
        for tensor in [
            r#"{"dtype":"F32","shape":[2]}"#,
            r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8,16]}"#,
            "3",
        ] {
            let message = one(tensor);
            assert!(
                message.starts_with("header is not valid: m.safetensors: t: line 1, column "),
                "{message}"
            );
        }
    }

    #[test]
    fn overlaps_and_names_used_twice_are_refused() {
        let tensor =
            |offsets: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}"#);
        let overlap = format!(r#"{{"a":{},"b":{}}}"#, tensor("[0,4]"), tensor("[2,6]"));
        assert!(
            refusal(&with_header(&overlap, 8)).starts_with("tensors overlap: m.safetensors: b: ")
        );
        let twice = format!(r#"{{"a":{},"a":{}}}"#, tensor("[0,4]"), tensor("[4,8]"));
        assert_eq!(
            refusal(&with_header(&twice, 8)),
            "tensor is stored twice: m.safetensors: a"
        );
    }

    #[test]
    fn headers_that_are_not_json_objects_are_refused() {
        for header in ["", "[]", "{", "nul", "{\"a\":", "{} x"] {
            let message = refusal(&with_header(header, 0));
            assert!(
                message.starts_with("header is not valid: m.safetensors: "),
                "{header}: {message}"
            );
        }
        let mut file = with_header("{\"a\":1}", 0);
        file[10] = 0xff;
        assert_eq!(refusal(&file), "header is not UTF-8: m.safetensors: byte 2");
    }

    proptest! {
        /// Damage never panics, and what we accept the reference reads to the same bytes.
        #[test]
        fn damaged_headers_never_panic(damage in prop::collection::vec((0usize..200, any::<u8>()), 1..4)) {
            let mut file = sample();
            for (at, byte) in damage {
                let at = at % file.len();
                file[at] = byte;
            }
            if let Ok(entries) = read(&file) {
                let reference = SafeTensors::deserialize(&file).expect("reference");
                for entry in entries {
                    let tensor = reference.tensor(&entry.name).expect("name");
                    prop_assert_eq!(tensor.data(), &file[entry.range.clone()]);
                }
            }
        }

        /// Any offsets and any shape: refused or inside the file.
        #[test]
        fn any_numbers_are_refused_or_fit(from in any::<u64>(), to in 0u64..40, shape in prop::collection::vec(any::<u64>(), 0..4)) {
            let header = format!(r#"{{"t":{{"dtype":"F16","shape":{shape:?},"data_offsets":[{from},{to}]}}}}"#);
            if let Ok(entries) = read(&with_header(&header, 20)) {
                prop_assert_eq!(entries[0].range.len(), 20);
            }
        }
    }
}
