//! `qwen2 convert`: a checkpoint in another form.

use qwen2_core::{DType, convert};

use crate::args::ConvertArgs;
use crate::failure::Failure;
use crate::{load, output};

pub(crate) fn run(args: &ConvertArgs) -> Result<(), Failure> {
    let dtype: Option<DType> = args.dtype.as_deref().map(str::parse).transpose()?;
    let source = load::source(&args.model);
    load::with_bar("converting", |progress| {
        convert(source, &args.destination, dtype, progress)
    })?;
    output::print(&format!("{} is written\n", args.destination.display()))
}
