//! The C interface: the verbs of `qwen2-core` behind opaque handles; its manual is
//! `include/qwen2.h`.
#![allow(
    unsafe_code,
    reason = "the border to C; what turns pointers into references is in fence.rs"
)]
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "every entry is an unsafe function as a whole: its contract is the header"
)]
#![allow(
    clippy::missing_safety_doc,
    reason = "the contract of every entry is stated once, at the head of the header"
)]
#![allow(non_camel_case_types, reason = "these are C's names")]

mod error;
mod fence;
mod generation;
mod load;
mod log;
mod model;
mod options;
mod prompt;
mod session;
mod stream;
mod tokenizer;
mod values;

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

pub use error::*;
pub use generation::*;
pub use load::*;
pub use log::*;
pub use model::*;
pub use options::*;
pub use prompt::*;
pub use session::*;
pub use stream::*;
pub use tokenizer::*;
pub use values::*;

/// The version of the binary interface that this header describes: the number behind
/// `libqwen2.so.`. It changes when something that compiled and ran would no longer do so.
pub const QWEN2_ABI_VERSION: u32 = 0;

/// The ABI version of the library at run time; compare it with `QWEN2_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_abi_version() -> u32 {
    QWEN2_ABI_VERSION
}

/// The version of the library, for example "0.1.0"; never freed.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// The devices that this build of the library can use, separated by commas, for example
/// "cpu,vulkan"; never freed. Whether one is there, shows when a model is loaded on it.
#[unsafe(no_mangle)]
pub extern "C" fn qwen2_devices() -> *const c_char {
    static DEVICES: OnceLock<std::ffi::CString> = OnceLock::new();
    let devices = DEVICES.get_or_init(|| values::c_string(&qwen2_core::Device::compiled().join(",")));
    CStr::as_ptr(devices)
}
