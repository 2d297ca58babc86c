//! Linker arguments of the shared library: its soname, and that only our own symbols leave it.

/// The ABI version, `QWEN2_ABI_VERSION` in src/lib.rs; tests/exports.rs compares the two.
const ABI: u32 = 0;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let arg = |arg: &str| println!("cargo:rustc-cdylib-link-arg={arg}");
    match std::env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos") => arg(&format!("-Wl,-install_name,@rpath/libqwen2.{ABI}.dylib")),
        Ok("windows") => {}
        // A version script of our own is no way to hide symbols: rustc passes one already, GNU ld
        // refuses a second one and lld takes the union. What rustc would let out beyond ours are
        // symbols of libraries inside dependencies, and those this argument keeps in.
        _ => {
            arg(&format!("-Wl,-soname,libqwen2.so.{ABI}"));
            arg("-Wl,--exclude-libs,ALL");
        }
    }
}
