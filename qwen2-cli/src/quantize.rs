//! `qwen2 quantize`: a checkpoint into a packed directory or a quantized GGUF file.

use qwen2_core::{Quantization, quantize};

use crate::args::QuantizeArgs;
use crate::failure::Failure;
use crate::{load, output};

pub(crate) fn run(args: &QuantizeArgs) -> Result<(), Failure> {
    let quantization: Quantization = args.precision.parse()?;
    check_format(args)?;
    let source = load::source(&args.model);
    load::with_bar("packing", |progress| {
        quantize(source, &args.destination, quantization, progress)
    })?;
    output::print(&format!(
        "{} is packed in {}\n",
        args.destination.display(),
        quantization.name()
    ))
}

/// The library goes by the name, so name and format must agree.
fn check_format(args: &QuantizeArgs) -> Result<(), Failure> {
    let ending = args.destination.extension().unwrap_or_default();
    let is_gguf = ending.eq_ignore_ascii_case("gguf");
    let place = args.destination.display();
    match args.format.as_deref() {
        None => Ok(()),
        Some("gguf") if is_gguf => Ok(()),
        Some("packed") if !is_gguf => Ok(()),
        Some("gguf") => Err(Failure::usage(
            format!("{place} does not end in .gguf"),
            "name the file so",
        )),
        Some("packed") => Err(Failure::usage(
            format!("{place} ends in .gguf"),
            "name the directory otherwise",
        )),
        Some(other) => Err(Failure::usage(
            format!("unknown format: `{}`", other.escape_debug()),
            "one of packed, gguf",
        )),
    }
}
