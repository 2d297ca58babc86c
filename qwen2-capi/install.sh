#!/bin/sh
# Installs the C library: ./qwen2-capi/install.sh PREFIX [cargo arguments, as --features vulkan]
#
#   PREFIX/lib      libqwen2.so.VERSION and its links, libqwen2.a
#   PREFIX/include  qwen2.h qwen2.hpp
#   PREFIX/lib/pkgconfig/qwen2.pc, PREFIX/lib/cmake/qwen2/qwen2-config*.cmake
#
# Then: cc app.c $(pkg-config --cflags --libs qwen2), or find_package(qwen2) and qwen2::qwen2.
# QWEN2_LIBRARY_DIR: install the libraries of that folder, and build nothing.
set -eu

if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
prefix=$1
shift
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml" | head -n 1)
abi=$(sed -n 's/^pub const QWEN2_ABI_VERSION: u32 = \(.*\);/\1/p' "$here/src/version.rs")

# The libraries without the rlib: with it, cargo leaves link-time optimisation out.
static_libs=
if [ -n "${QWEN2_LIBRARY_DIR:-}" ]; then
    built=$QWEN2_LIBRARY_DIR
else
    notes=$(mktemp -d)
    trap 'rm -rf "$notes"' EXIT
    # The status of cargo, not that of tee, decides.
    { (cd "$here" && cargo rustc --release --locked --lib --crate-type cdylib,staticlib "$@" -- \
        --print native-static-libs 2>&1) && : > "$notes/done"; } | tee "$notes/log" >&2
    [ -e "$notes/done" ]
    built=${CARGO_TARGET_DIR:-$here/../target}/release
    # What a program that links libqwen2.a needs besides.
    static_libs=$(sed -n 's/.*native-static-libs: //p' "$notes/log" | tail -n 1)
fi
: "${static_libs:=-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc}"

install -d "$prefix/lib/pkgconfig" "$prefix/lib/cmake/qwen2" "$prefix/include"
install -m 644 "$here/../include/qwen2.h" "$here/../include/qwen2.hpp" "$prefix/include"
install -m 644 "$built/libqwen2.a" "$prefix/lib"
case $(uname -s) in
Darwin)
    install -m 755 "$built/libqwen2.dylib" "$prefix/lib/libqwen2.$version.dylib"
    ln -sf "libqwen2.$version.dylib" "$prefix/lib/libqwen2.$abi.dylib"
    ln -sf "libqwen2.$abi.dylib" "$prefix/lib/libqwen2.dylib"
    shared=libqwen2.$abi.dylib
    ;;
*)
    install -m 755 "$built/libqwen2.so" "$prefix/lib/libqwen2.so.$version"
    ln -sf "libqwen2.so.$version" "$prefix/lib/libqwen2.so.$abi"
    ln -sf "libqwen2.so.$abi" "$prefix/lib/libqwen2.so"
    shared=libqwen2.so.$abi
    ;;
esac

fill() {
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@VERSION@|$version|g" -e "s|@SHARED@|$shared|g" \
        -e "s|@STATIC_LIBS@|$static_libs|g" "$here/cmake/$1.in" > "$2/$1"
}
fill qwen2.pc "$prefix/lib/pkgconfig"
fill qwen2-config.cmake "$prefix/lib/cmake/qwen2"
fill qwen2-config-version.cmake "$prefix/lib/cmake/qwen2"
echo "qwen2 $version is in $prefix"
