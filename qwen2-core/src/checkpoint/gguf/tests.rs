//! Blocks against the gguf package's numbers, and every way to damage a header.

use proptest::prelude::*;

use super::blocks::Kind;
use super::reader::{self, Value};
use super::*;
use crate::error::ErrorKind;

fn conformance(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../conformance")
        .join(name)
}

#[test]
fn blocks_stand_for_the_numbers_of_the_gguf_package() {
    let text = fs::read_to_string(conformance("gguf_blocks.json")).expect("vectors");
    let vectors: serde_json::Value = serde_json::from_str(&text).expect("json");
    let cases = vectors["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 11);
    for case in cases {
        let name = case["name"].as_str().expect("name");
        let kind = (0..64)
            .filter_map(Kind::from_id)
            .find(|kind| kind.name() == name);
        let hex = case["bytes"]
            .as_str()
            .expect("bytes")
            .as_bytes()
            .as_chunks::<2>()
            .0;
        let digits = hex
            .iter()
            .map(|pair| std::str::from_utf8(pair).expect("ascii"));
        let bytes: Vec<u8> = digits
            .map(|pair| u8::from_str_radix(pair, 16).expect("hex"))
            .collect();
        let want = case["values"].as_array().expect("values").iter();
        let want: Vec<f32> = want.map(|x| x.as_f64().expect("number") as f32).collect();
        let mut got = vec![f32::NAN; want.len()];
        kind.expect("known").dequantize(&bytes, &mut got);
        assert_eq!(got, want, "{name}");
    }
}

/// A file in the making.
struct File(Vec<u8>);

const U32: u32 = 4;
const TEXT: u32 = 8;
const LIST: u32 = 9;

impl File {
    fn new(version: u32, tensors: u64, keys: u64) -> Self {
        let mut file = Self(b"GGUF".to_vec());
        file.0.extend(version.to_le_bytes());
        file.0.extend(tensors.to_le_bytes());
        file.0.extend(keys.to_le_bytes());
        file
    }

    fn text(mut self, text: &str) -> Self {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
        self
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn alignment(self, bytes: u32) -> Self {
        self.text("general.alignment").u32(U32).u32(bytes)
    }

    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let file = self.text(name).u32(dims.len() as u32);
        let file = dims.iter().fold(file, |file, dim| file.u64(*dim));
        file.u32(kind).u64(offset)
    }

    /// Zeros for the tensors, behind the padded header.
    fn data(mut self, n: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + n, 0);
        self
    }

    fn read(&self) -> Result<reader::Header> {
        reader::read(&self.0, Path::new("/m/model.gguf"))
    }
}

#[test]
fn a_header_is_read() {
    let file = File::new(3, 2, 3)
        .text("a")
        .u32(U32)
        .u32(7)
        .text("b")
        .u32(TEXT)
        .text("hello")
        .text("c")
        .u32(LIST)
        .u32(TEXT)
        .u64(2)
        .text("x")
        .text("yz")
        .tensor("q", &[64, 2], 8, 0)
        .tensor("f", &[3], 0, 160)
        .data(172);
    let header = file.read().expect("valid");
    assert_eq!(header.metadata["a"], Value::Integer(7));
    let Value::Text(range) = &header.metadata["b"] else {
        panic!("text");
    };
    assert_eq!(&file.0[range.clone()], b"hello");
    let Value::Texts(n, range) = &header.metadata["c"] else {
        panic!("texts");
    };
    let texts: Vec<_> = reader::texts(&file.0, *n, range.clone()).collect();
    assert_eq!(texts, [Some("x"), Some("yz")]);
    let shapes: Vec<_> = header
        .tensors
        .iter()
        .map(|tensor| (tensor.shape.clone(), tensor.range.len()))
        .collect();
    assert_eq!(shapes, [(vec![2, 64], 136), (vec![3], 12)]);
}

#[test]
fn a_damaged_header_is_a_typed_error_that_says_where() {
    let one = |dims: &[u64], kind, offset| {
        let file = File::new(3, 1, 0).tensor("t", dims, kind, offset);
        file.data(4096)
    };
    let list = |kind: u32, n: u64| {
        let file = File::new(3, 0, 1).text("key").u32(LIST);
        file.u32(kind).u64(n)
    };
    let cases = [
        ("empty", File(Vec::new()), "does not begin with GGUF"),
        (
            "another file",
            File(b"PK\x03\x04rest".to_vec()),
            "does not begin with GGUF",
        ),
        ("version 0", File::new(0, 0, 0), "version 0"),
        ("version 1", File::new(1, 0, 0), "version 1"),
        ("version 99", File::new(99, 0, 0), "version 99"),
        (
            "big-endian",
            File::new(3_u32.swap_bytes(), 0, 0),
            "big-endian",
        ),
        (
            "tensors 2^63",
            File::new(3, 1 << 63, 0),
            "9223372036854775808 tensors",
        ),
        (
            "keys 2^63",
            File::new(3, 0, 1 << 63),
            "9223372036854775808 keys",
        ),
        ("key of 2^63", File::new(3, 0, 1).u64(1 << 63), "cut off"),
        (
            "empty key",
            File::new(3, 0, 1).text("").u32(U32).u32(1),
            "empty",
        ),
        (
            "key not UTF-8",
            {
                let mut file = File::new(3, 0, 1).u64(2);
                file.0.extend([0xC3, 0x28]);
                file
            },
            "not UTF-8",
        ),
        (
            "key twice",
            {
                let file = File::new(3, 0, 2).text("key").u32(U32).u32(1);
                file.text("key").u32(U32).u32(2)
            },
            "key: the key is there twice",
        ),
        (
            "string of 2^63",
            File::new(3, 0, 1).text("key").u32(TEXT).u64(1 << 63),
            "cut off",
        ),
        (
            "unknown value",
            File::new(3, 0, 1).text("key").u32(13).u64(0),
            "key: a value of the unknown type 13",
        ),
        ("list of lists", list(9, 1), "key: a list of lists"),
        ("list of 2^63 numbers", list(6, 1 << 63), "cut off"),
        (
            "list of 2^63 strings",
            list(8, 1 << 63),
            "key: 9223372036854775808 strings",
        ),
        (
            "list of an unknown type",
            list(77, 1),
            "key: a list of the unknown type 77",
        ),
        (
            "alignment 0",
            File::new(3, 0, 1).alignment(0),
            "general.alignment: not a power of two",
        ),
        (
            "alignment 3",
            File::new(3, 0, 1).alignment(3),
            "general.alignment: not a power of two",
        ),
        (
            "alignment 2^31",
            File::new(3, 0, 1).alignment(1 << 31),
            "general.alignment: not a power of two",
        ),
        (
            "alignment as text",
            File::new(3, 0, 1)
                .text("general.alignment")
                .u32(TEXT)
                .text("32"),
            "general.alignment",
        ),
        ("no dimension", one(&[], 0, 0), "t: 0 dimensions"),
        ("nine dimensions", one(&[1; 9], 0, 0), "t: 9 dimensions"),
        ("dimension 0", one(&[4, 0], 0, 0), "t: the dimensions"),
        (
            "dimensions that overflow",
            one(&[1 << 40, 1 << 40], 0, 0),
            "t: the dimensions",
        ),
        ("dimension 2^63", one(&[1 << 63], 0, 0), "t: the dimensions"),
        ("a prime row", one(&[37], 8, 0), "t: rows of 37 numbers"),
        ("an odd place", one(&[4], 0, 4), "t: it begins at 4"),
        ("behind the end", one(&[4], 0, 1 << 40), "t: it ends behind"),
        (
            "an offset that overflows",
            one(&[4], 0, u64::MAX - 31),
            "t: it ends behind",
        ),
        ("too long", one(&[4096], 0, 0), "t: it ends behind"),
        ("unknown type", one(&[32], 4, 0), "t: ggml type 4"),
        (
            "tensor twice",
            {
                let file = File::new(3, 2, 0).tensor("t", &[8], 0, 0);
                file.tensor("t", &[8], 0, 32).data(64)
            },
            "t: the tensor is there twice",
        ),
        (
            "overlap",
            {
                let file = File::new(3, 2, 0).tensor("a", &[16], 0, 0);
                file.tensor("b", &[8], 0, 32).data(64)
            },
            "b: its bytes are those of a as well",
        ),
    ];
    for (name, file, message) in cases {
        let error = file.read().expect_err(name);
        let kind = error.kind();
        assert!(
            matches!(kind, ErrorKind::InvalidFile | ErrorKind::Unsupported),
            "{name}: {kind:?}"
        );
        assert!(error.to_string().contains(message), "{name}: {error}");
        assert!(
            error.to_string().contains("/m/model.gguf"),
            "{name}: {error}"
        );
        assert!(error.help().is_some(), "{name}");
    }
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let whole = fs::read(conformance("gguf/moe.gguf")).expect("fixture");
    let directory = tempfile::tempdir().expect("tempdir");
    let path = directory.path().join("cut.gguf");
    // Every 4 KiB, and densely through the first keys.
    for len in (0..whole.len()).step_by(4096).chain(0..700) {
        fs::write(&path, &whole[..len]).expect("write");
        let error = open(&path).expect_err("cut off");
        assert_eq!(error.kind(), ErrorKind::InvalidFile, "{len}: {error}");
    }
}

#[test]
fn a_part_must_be_there_and_be_the_one_it_says() {
    let directory = tempfile::tempdir().expect("tempdir");
    let part = |n: usize| format!("bf16_shards-0000{n}-of-00002.gguf");
    let to = |n: usize| directory.path().join(part(n));
    fs::copy(conformance("gguf").join(part(1)), to(1)).expect("copy");
    let error = open(&to(1)).expect_err("missing");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains(&part(2)), "{error}");
    fs::copy(conformance("gguf").join(part(1)), to(2)).expect("copy");
    let error = open(&to(1)).expect_err("the first twice");
    assert_eq!(error.key(), Some("split.no"), "{error}");
    fs::copy(conformance("gguf").join(part(2)), to(2)).expect("copy");
    let (from_first, _) = open(&to(1)).expect("whole");
    let (from_second, _) = open(&to(2)).expect("whole");
    assert_eq!(from_first.iter().count(), from_second.iter().count());
}

#[test]
fn missing_and_foreign_metadata_names_its_key() {
    let whole = fs::read(conformance("gguf/moe.gguf")).expect("fixture");
    let directory = tempfile::tempdir().expect("tempdir");
    let path = directory.path().join("changed.gguf");
    for (from, to, key) in [
        (
            "qwen2moe.block_count",
            "qwen2moe.block_cXunt",
            "qwen2moe.block_count",
        ),
        (
            "qwen2moe.expert_count",
            "qwen2moe.expert_cXunt",
            "qwen2moe.expert_count",
        ),
        (
            "general.architecture",
            "general.architectuXe",
            "general.architecture",
        ),
        (
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.tokenX",
            "tokenizer.ggml.tokens",
        ),
        (
            "tokenizer.ggml.merges",
            "tokenizer.ggml.mergeX",
            "tokenizer.ggml.merges",
        ),
        (
            "tokenizer.ggml.model",
            "tokenizer.ggml.modeX",
            "tokenizer.ggml.model",
        ),
        ("gpt2", "bert", "tokenizer.ggml.model"),
        (
            "token_embd.weight",
            "token_embX.weight",
            "token_embd.weight",
        ),
    ] {
        let at = whole
            .windows(from.len())
            .position(|bytes| bytes == from.as_bytes())
            .expect("there");
        let mut changed = whole.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(&path, changed).expect("write");
        let error = open(&path).expect_err(key);
        assert_eq!(error.key(), Some(key), "{error}");
        assert_eq!(error.path(), Some(path.as_path()));
    }
}

#[test]
fn yarn_in_a_file_is_followed_or_refused_by_key() {
    const F32: u32 = 6;
    let scaling = |keys: &[(&str, f32)]| {
        let mut file = File::new(3, 0, keys.len() as u64 + 1);
        file = file.text("q.rope.scaling.type").u32(TEXT).text("yarn");
        for (name, number) in keys {
            let key = format!("q.{name}");
            file = file.text(&key).u32(F32).u32(number.to_bits());
        }
        let header = file.read().expect("valid");
        let metadata = Metadata {
            header: &header,
            file: &file.0,
            path: Path::new("/m/model.gguf"),
        };
        config::rope_scaling(&metadata, &|key| format!("q.{key}"))
    };
    let factor = ("rope.scaling.factor", 4.0);
    let followed = scaling(&[
        factor,
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
    ]);
    let want = serde_json::json!({"type": "yarn", "factor": 4.0, "extrapolation_factor": 0.5});
    assert_eq!(followed.expect("followed"), Some(want));
    for (name, number) in [
        ("rope.scale_linear", 4.0),
        ("rope.scaling.yarn_attn_factor", 1.5),
        ("rope.scaling.yarn_log_multiplier", 0.1),
    ] {
        let error = scaling(&[factor, (name, number)]).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!(error.key(), Some(format!("q.{name}").as_str()), "{error}");
        assert!(error.path().is_some() && error.help().is_some());
    }
}

proptest! {
    #[test]
    fn no_change_of_the_header_is_more_than_an_error(
        at in 0_usize..12_000, byte in any::<u8>(), and in 0_usize..12_000, other in any::<u8>(),
    ) {
        let mut file = fs::read(conformance("gguf/moe.gguf")).expect("fixture");
        file[at] = byte;
        file[and] = other;
        if let Ok(header) = reader::read(&file, Path::new("x.gguf")) {
            for tensor in header.tensors {
                prop_assert!(tensor.range.end <= file.len());
            }
        }
    }
}
