//! The tensors that make up a quantized matrix of GPTQ or AWQ become one, checked against each other.

use std::path::Path;

use super::Encoding;
use super::groups::Groups;
use super::shards::{Place, Weights};
use crate::config::{DType, GroupMethod, GroupQuantization, one_line};
use crate::error::{Error, ErrorKind, Result};

/// What lies beside the integers of a matrix.
#[derive(Debug)]
pub(super) struct GroupPlaces {
    quantization: GroupQuantization,
    zeros: Place,
    scales: (DType, Place),
    order: Option<Place>,
}

const WEIGHTS: &str = ".qweight";
/// Projections of Qwen2 that have a bias.
const BIASED: [&str; 3] = [".q_proj", ".k_proj", ".v_proj"];

impl Weights {
    /// Makes one tensor `X.weight` of every `X.qweight` and what belongs to it. Biases of projections
    /// that have none, which some quantizers write as zeros, are passed over, as by vLLM.
    ///
    /// # Errors
    /// `InvalidFile` for what is missing, of a wrong type or shape, or out of range.
    pub(super) fn join_groups(&mut self, quantization: GroupQuantization) -> Result<()> {
        let stems = self
            .tensors
            .keys()
            .filter_map(|name| name.strip_suffix(WEIGHTS));
        let stems: Vec<String> = stems.map(str::to_owned).collect();
        for stem in stems {
            let place = self.join(&stem, quantization)?;
            self.tensors.insert(format!("{stem}.weight"), place);
            if !BIASED.iter().any(|projection| stem.ends_with(projection)) {
                self.tensors.remove(&format!("{stem}.bias"));
            }
        }
        Ok(())
    }

    fn join(&mut self, stem: &str, quantization: GroupQuantization) -> Result<Place> {
        let words = Encoding::Words;
        let weights = self.part(stem, "qweight", &[words])?;
        let zeros = self.part(stem, "qzeros", &[words])?;
        let numbers = [DType::F16, DType::BF16, DType::F32].map(Encoding::Numbers);
        let scales = self.part(stem, "scales", &numbers)?;
        let Encoding::Numbers(dtype) = scales.encoding else {
            unreachable!("one of the numbers");
        };
        let order_name = format!("{stem}.g_idx");
        let order = match self.tensors.contains_key(&order_name) {
            true => Some(self.part(stem, "g_idx", &[words])?),
            false => None,
        };
        let per_word = 32 / quantization.bits as usize;
        let wrong = |part: &str, found: &[usize], expected: String| {
            let error = Error::new(ErrorKind::InvalidFile, "tensor has the wrong shape");
            let error = error.with_path(self.path_of(&weights));
            Err(error
                .with_key(one_line(&format!("{stem}.{part}")))
                .with_why(format!("expected {expected}, found {found:?}"))
                .with_help("does quantization_config of config.json fit this checkpoint?"))
        };
        let [first, second] = *weights.shape.as_slice() else {
            return wrong("qweight", &weights.shape, "two dimensions".to_owned());
        };
        // Beside a dimension of 0 the other one is not bounded by the file.
        let (inputs, outputs) = match quantization.quant_method {
            _ if first == 0 || second == 0 => {
                return wrong("qweight", &weights.shape, "dimensions above 0".to_owned());
            }
            GroupMethod::Awq => (first, second * per_word),
            GroupMethod::Gptq | GroupMethod::GptqV2 => (first * per_word, second),
        };
        let groups = quantization
            .group_size
            .map_or(1, |size| inputs.div_ceil(size));
        if !outputs.is_multiple_of(per_word) {
            let expected = format!("a multiple of {per_word} outputs");
            return wrong("qweight", &weights.shape, expected);
        }
        for (part, place, expected) in [
            ("qzeros", &zeros, vec![groups, outputs / per_word]),
            ("scales", &scales, vec![groups, outputs]),
        ] {
            if place.shape != expected {
                return wrong(part, &place.shape, format!("{expected:?}"));
            }
        }
        if let Some(order) = &order {
            if order.shape != [inputs] {
                return wrong("g_idx", &order.shape, format!("{:?}", [inputs]));
            }
            self.check_order(order, groups, &order_name)?;
        }
        Ok(Place {
            encoding: Encoding::Grouped,
            shape: vec![outputs, inputs],
            groups: Some(Box::new(GroupPlaces {
                quantization,
                zeros,
                scales: (dtype, scales),
                order,
            })),
            ..weights
        })
    }

    /// Takes one tensor of a matrix out of the list.
    fn part(&mut self, stem: &str, part: &str, encodings: &[Encoding]) -> Result<Place> {
        let name = format!("{stem}.{part}");
        let Some(place) = self.tensors.remove(&name) else {
            return Err(Error::new(
                ErrorKind::InvalidFile,
                format!("no tensor named {}", one_line(&name)),
            )
            .with_path(self.any_path())
            .with_why(format!("{}.qweight is there", one_line(stem)))
            .with_help("the checkpoint is not whole: download it again"));
        };
        if encodings.contains(&place.encoding) {
            return Ok(place);
        }
        let expected: Vec<_> = encodings.iter().map(ToString::to_string).collect();
        Err(
            Error::new(ErrorKind::InvalidFile, "tensor has the wrong type")
                .with_path(self.path_of(&place))
                .with_key(one_line(&name))
                .with_why(format!(
                    "expected {}, found {}",
                    expected.join(" or "),
                    place.encoding
                ))
                .with_help("does quantization_config of config.json fit this checkpoint?"),
        )
    }

    fn check_order(&self, order: &Place, groups: usize, name: &str) -> Result<()> {
        let bytes = self.bytes_of(order);
        let numbers = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| i32::from_le_bytes(*bytes));
        let is_there = |group: i32| usize::try_from(group).is_ok_and(|group| group < groups);
        match numbers.enumerate().find(|(_, group)| !is_there(*group)) {
            None => Ok(()),
            Some((input, group)) => {
                Err(Error::new(ErrorKind::InvalidFile, "group is out of range")
                    .with_path(self.path_of(order))
                    .with_key(one_line(name))
                    .with_why(format!(
                        "input {input} is of group {group}, there are {groups}"
                    ))
                    .with_help("the file is damaged: download it again"))
            }
        }
    }

    fn any_path(&self) -> &Path {
        self.files.first().map_or(Path::new(""), |file| &file.path)
    }

    /// The matrix at a joined place.
    pub(super) fn groups_at(&self, place: &Place) -> Option<Groups> {
        let places = place.groups.as_deref()?;
        Some(Groups {
            quantization: places.quantization,
            outputs: place.shape[0],
            inputs: place.shape[1],
            weights: self.bytes_of(place),
            zeros: self.bytes_of(&places.zeros),
            scales: (places.scales.0, self.bytes_of(&places.scales.1)),
            order: places.order.as_ref().map(|order| self.bytes_of(order)),
        })
    }
}
