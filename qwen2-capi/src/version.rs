//! What this build of the library is.

use std::ffi::{CString, c_char};
use std::sync::OnceLock;

use crate::values::c_string;

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
    static DEVICES: OnceLock<CString> = OnceLock::new();
    DEVICES
        .get_or_init(|| c_string(&qwen2_core::Device::compiled().join(",")))
        .as_ptr()
}
