//! Matrices that GPTQ or AWQ has quantized: integers in 32-bit words, with a scale and a zero point for
//! every group of input features. A weight is `(q - zero) · scale`.

use bytes::Bytes;
use half::{bf16, f16};

use crate::config::{DType, GroupMethod, GroupQuantization};

/// One matrix, `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub(crate) struct Groups {
    pub(super) quantization: GroupQuantization,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// GPTQ: `[inputs · bits / 32, outputs]`, AWQ: `[inputs, outputs · bits / 32]`.
    pub(super) weights: Bytes,
    /// `[groups, outputs · bits / 32]`.
    pub(super) zeros: Bytes,
    /// `[groups, outputs]`.
    pub(super) scales: (DType, Bytes),
    /// The group of every input, where they are not in order; checked to be below the groups.
    pub(super) order: Option<Bytes>,
}

/// Where AWQ has the eight columns of a word.
const AWQ_PLACES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

fn word(words: &Bytes, index: usize) -> u32 {
    let at = 4 * index;
    u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]])
}

impl Groups {
    fn per_word(&self) -> usize {
        32 / self.quantization.bits as usize
    }

    fn mask(&self) -> u32 {
        (1 << self.quantization.bits) - 1
    }

    /// The group of an input.
    fn group(&self, input: usize) -> usize {
        match &self.order {
            Some(order) => word(order, input) as usize,
            None => input / self.quantization.group_size.unwrap_or(self.inputs),
        }
    }

    /// The place in its word of an integer that is packed along the outputs.
    fn shift(&self, output: usize) -> u32 {
        let place = output % self.per_word();
        self.quantization.bits
            * match self.quantization.quant_method {
                GroupMethod::Awq => AWQ_PLACES[place],
                GroupMethod::Gptq | GroupMethod::GptqV2 => place as u32,
            }
    }

    fn quant(&self, output: usize, input: usize) -> u32 {
        let per_word = self.per_word();
        let (index, shift) = match self.quantization.quant_method {
            GroupMethod::Awq => {
                let index = input * (self.outputs / per_word) + output / per_word;
                (index, self.shift(output))
            }
            GroupMethod::Gptq | GroupMethod::GptqV2 => {
                let index = input / per_word * self.outputs + output;
                (index, self.quantization.bits * (input % per_word) as u32)
            }
        };
        word(&self.weights, index) >> shift & self.mask()
    }

    fn zero(&self, output: usize, group: usize) -> u32 {
        let per_word = self.per_word();
        let stored = word(
            &self.zeros,
            group * (self.outputs / per_word) + output / per_word,
        );
        let stored = stored >> self.shift(output) & self.mask();
        match self.quantization.quant_method {
            GroupMethod::Gptq => (stored + 1) & self.mask(),
            GroupMethod::GptqV2 | GroupMethod::Awq => stored,
        }
    }

    fn scale(&self, output: usize, group: usize) -> f32 {
        let (dtype, bytes) = &self.scales;
        let at = (group * self.outputs + output) * dtype.size_in_bytes();
        match dtype {
            DType::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
            DType::BF16 => bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
            DType::F32 => {
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
        }
    }

    /// Row `output` of the matrix.
    pub(crate) fn row(&self, output: usize, out: &mut [f32]) {
        let mut last = None;
        for (input, out) in out.iter_mut().enumerate() {
            let group = self.group(input);
            let (_, zero, scale) = match last {
                Some((same, zero, scale)) if same == group => (group, zero, scale),
                _ => (group, self.zero(output, group), self.scale(output, group)),
            };
            last = Some((group, zero, scale));
            *out = (self.quant(output, input) as i32 - zero as i32) as f32 * scale;
        }
    }

    /// Scale and `q - zero` of the `N` inputs from `first` on, which are of one group; see
    /// [`Self::has_blocks`].
    pub(crate) fn block<const N: usize>(&self, output: usize, first: usize) -> (f16, [i8; N]) {
        let group = self.group(first);
        let zero = self.zero(output, group) as i32;
        let quants = std::array::from_fn(|i| (self.quant(output, first + i) as i32 - zero) as i8);
        (f16::from_f32(self.scale(output, group)), quants)
    }

    /// As [`Self::block`] of four bits, with the zero point for itself: scale, zero and `q`.
    pub(crate) fn block_with_zero<const N: usize>(
        &self,
        output: usize,
        first: usize,
    ) -> (f16, f16, [i8; N]) {
        let group = self.group(first);
        (
            f16::from_f32(self.scale(output, group)),
            f16::from_f32(self.zero(output, group) as f32),
            std::array::from_fn(|i| self.quant(output, first + i) as i8),
        )
    }

    /// Whether every `n` inputs are of one group, with a scale that f16 holds and numbers `q - zero` of
    /// eight bits.
    pub(crate) fn has_blocks(&self, n: usize) -> bool {
        let alike = |first: usize| (1..n).all(|i| self.group(first + i) == self.group(first));
        self.scales.0 == DType::F16
            && self.inputs.is_multiple_of(n)
            && (0..self.inputs).step_by(n).all(alike)
            && (self.quantization.bits == 4 || self.zeros_are(128))
    }

    /// Whether all zero points are this one.
    pub(crate) fn zeros_are(&self, zero: u32) -> bool {
        let stored = match self.quantization.quant_method {
            GroupMethod::Gptq => zero - 1,
            GroupMethod::GptqV2 | GroupMethod::Awq => zero,
        };
        let word = (0..self.per_word()).fold(0, |word, place| {
            word | stored << (self.quantization.bits * place as u32)
        });
        self.zeros
            .as_chunks::<4>()
            .0
            .iter()
            .all(|bytes| *bytes == word.to_le_bytes())
    }

    /// Bits of an integer.
    pub(crate) fn bits(&self) -> u32 {
        self.quantization.bits
    }

    /// Bytes of all its tensors.
    pub(super) fn stored_bytes(&self) -> u64 {
        let order = self.order.as_ref().map_or(0, Bytes::len);
        (self.weights.len() + self.zeros.len() + self.scales.1.len() + order) as u64
    }
}
