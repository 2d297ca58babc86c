//! `qwen2 convert` and `qwen2 merge-lora`: a checkpoint in another form, or with an adapter.

use qwen2_core::{DType, convert, merge_lora};

use crate::args::{ConvertArgs, MergeArgs};
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

pub(crate) fn merge(args: &MergeArgs) -> Result<(), Failure> {
    let dtype: Option<DType> = args.dtype.as_deref().map(str::parse).transpose()?;
    let source = load::source(&args.model);
    load::with_bar("merging", |progress| {
        merge_lora(source, &args.adapter, &args.destination, dtype, progress)
    })?;
    output::print(&format!("{} is written\n", args.destination.display()))
}
