"""A kernel's source for the host: PTX becomes calls of device.h, shared memory a pointer.   IN OUT"""

import re
import sys
from pathlib import Path

HEADERS = r"#include <(mma\.h|cuda_fp16\.h|cuda_bf16\.h|cuda/barrier|cooperative_groups[\w/]*\.h)>"
ASM = r'asm\s*(?:volatile)?\s*\(\s*"((?:[^"\\]|\\.)*)"\s*:([^:;]*):([^;]*?)(?::[^:;]*)?\);'
NAME = r"__global__\s+void\s+(?:__launch_bounds__\(\d+\))?\s*(?:__cluster_dims__\([^)]*\))?\s*(\w+)\("
MMA = r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.\w+\.f32"
MATRICES = r"(ld|st)matrix\.sync\.aligned\.m8n8\.x\d(\.trans)?"
NUMBERS = {"bf16": "__nv_bfloat16", "f16": "__half", "tf32": "float"}

ENTRY = """
#include "fibers.cpp"
extern "C" const unsigned *emulated_sizes() {{ return emu::sizes({name}); }}
extern "C" void emulated_entry(const unsigned *grid, const unsigned *block, unsigned shared, void **params) {{
    emu::run(grid, block, shared, [](void **p) {{ emu::invoke({name}, p); }}, params);
}}
"""


def operands(text: str) -> list[str]:
    return re.findall(r'"[^"]*"\(((?:[^()]|\([^()]*\))*)\)', text)


def call(asm: re.Match[str]) -> str:
    """What the instruction does, as a call."""
    ptx, outs, ins = asm[1], operands(asm[2]), operands(asm[3])
    inputs = ", ".join(ins)
    if found := re.match(MMA, ptx):
        return f"emu::mma<{NUMBERS[found[2]]}, {found[1]}>(std::tie({', '.join(outs)}), {inputs});"
    if found := re.match(MATRICES, ptx):
        transposed = "true" if found[2] else "false"
        return f"emu::{found[1]}matrix<{transposed}>({', '.join([*ins, *outs])});"
    if found := re.match(r"(min|max)\.NaN\.f32", ptx):
        return f"{outs[0]} = f{found[1]}f({inputs});"
    if found := re.search(r"atom(?:\.\w+)*?\.(add|min|max)\.", ptx):
        return f"{outs[0]} = emu::atomic_{found[1]}<decltype({outs[0]})>({inputs});"
    if "elect.sync" in ptx:
        return f"{outs[0]} = emu::lane() == 0;"
    raise SystemExit(f"no emulation of {ptx!r}")


def translated(source: str) -> str:
    source = re.sub(HEADERS, "", source)
    source = re.sub(r"typedef [a-z ]+ u?int\d+_t;", "", source)
    source = re.sub(r"extern __shared__ \S+ char (\w+)\[\];", r"char *const \1 = emu::shared;", source)
    source = re.sub(ASM, call, source)
    name = re.search(NAME, source)
    if name is None:
        raise SystemExit("no kernel")
    return source + ENTRY.format(name=name[1])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translated(Path(sys.argv[1]).read_text()))
