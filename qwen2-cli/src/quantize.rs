//! `qwen2 quantize`: a checkpoint into a packed directory.

use qwen2_core::{Quantization, quantize};

use crate::args::QuantizeArgs;
use crate::failure::Failure;
use crate::{load, output};

pub(crate) fn run(args: &QuantizeArgs) -> Result<(), Failure> {
    let quantization: Quantization = args.precision.parse()?;
    let source = load::source(&args.model);
    load::with_bar("packing", |progress| {
        quantize(source, &args.directory, quantization, progress)
    })?;
    output::print(&format!(
        "{} is packed in {}\n",
        args.directory.display(),
        quantization.name()
    ))
}
