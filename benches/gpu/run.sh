#!/usr/bin/env bash
# One GPU: what it copies and multiplies in a second, transformers, and our speed in each shape and precision.
#   benches/gpu/run.sh QWEN2 [DEVICE] [SHAPES...]    a command built by scripts/gpu/build; Python with torch
# First the kernels' tests, where qwen2-tests lies beside QWEN2. Then a line of JSON each; the shares that
# docs/performance.md reports are of the copy's bytes, read and written.
set -euo pipefail
here=$(dirname "$0")
qwen2=$1 device=${2:-cuda}
shift $(($# > 2 ? 2 : $#))
shapes=("$@")
[ ${#shapes[@]} -gt 0 ] || shapes=(0.5b 1.5b 7b 57b-a14b)
tests=$(dirname "$qwen2")/qwen2-tests
[ ! -x "$tests" ] || QWEN2_TEST_DEVICE=$device "$tests" --test-threads 1 ops::gpu ||
    echo '{"engine": "tests", "error": "they failed"}'
python3 "$here/transformers_gpu.py" --shapes 0.5b 1.5b 7b || echo '{"engine": "transformers", "error": "it failed"}'
for shape in "${shapes[@]}"; do
    for precision in bf16 q8 q4; do
        "$qwen2" bench --device "$device" --shape "$shape" --precision "$precision" --json ||
            echo "{\"model\": \"$shape\", \"precision\": \"$precision\", \"error\": \"it failed\"}"
    done
done
"$qwen2" bench --device "$device" --shape 7b --precision bf16 --prompt 2048 --new 2 --json
"$qwen2" bench --device "$device" --shape 72b --precision q4 --json ||
    echo '{"model": "72b", "precision": "q4", "error": "it failed"}'
