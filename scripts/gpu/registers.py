"""What NVIDIA's compiler makes of kernels that scripts/gpu/emulate kept: registers and spills on sm_90.

Needs nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12, which pip installs; NAME is a part of kernels' names:
    python3 scripts/gpu/registers.py target/emulator [NAME]
"""

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCH = "sm_90a"


def package(name: str) -> Path:
    spec = importlib.util.find_spec(f"nvidia.{name}")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"nvidia.{name} is not installed: pip install nvidia-{name.replace('_', '-')}-cu12")
    return Path(spec.submodule_search_locations[0])


def ptx(nvrtc: ctypes.CDLL, source: bytes, include: Path) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, None, 0, None, None)
    options = [f"--gpu-architecture={ARCH}".encode(), f"--include-path={include}".encode()]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    what = "ProgramLog" if failed else "PTX"
    nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc[f"nvrtcGet{what}"](program, text)
    if failed:
        raise SystemExit(text.value.decode())
    return text.value


def main() -> None:
    folder, wanted = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    nvrtc = ctypes.CDLL(str(next(package("cuda_nvrtc").glob("lib/libnvrtc.so.*"))))
    ptxas = package("cuda_nvcc") / "bin" / "ptxas"
    include = Path(os.environ.get("CUDA_PATH", folder / "cuda")) / "include"
    for path in sorted(folder.glob("*.cu")):
        source = path.read_bytes()
        name = re.search(rb"(\w+)\([^()]*(?:\([^()]*\)[^()]*)*\) \{", source[source.index(b"__global__") :])
        if name is None or wanted.encode() not in name[1]:
            continue
        command: list[str | Path]
        with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
            file.write(ptx(nvrtc, source, include))
            file.flush()
            command = [ptxas, f"-arch={ARCH}", "-v", file.name, "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.search(r"(\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL)
        spilled, registers = found.groups() if found else ("?", "?")
        row = f"{registers:>4} registers {spilled:>5} bytes spilled"
        print(row, path.stem, name[1].decode(), flush=True)


if __name__ == "__main__":
    main()
