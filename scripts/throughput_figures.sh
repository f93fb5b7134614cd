#!/usr/bin/env bash
# The throughput table of docs/figures.md: one Llama shape with 8 and with 2 KV heads, 64 sequences, all engines in turns.
#
#     VLLM_PYTHON=vllm-env/bin/python LLAMACPP=.llamacpp/build/bin/llama-batched-bench \
#         bash scripts/throughput_figures.sh throughput.jsonl
#
# Whichever of the two is not set is left out.  DTYPE=bfloat16 measures bf16 weights instead, without transformers.  About 12 minutes on two cores; nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
output=$(realpath "${1:?the file to append records to}")
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
dtype=${DTYPE:-float32}
case $dtype in
    float32) engines=(fastdecode hf) weights=(f32 f16 bf16) kv_dtype=float16 ;;
    bfloat16) engines=(fastdecode) weights=(bf16) kv_dtype=bfloat16 ;;
    *) echo "DTYPE is float32 or bfloat16, not $dtype" >&2 && exit 2 ;;
esac
places=()
[ -n "${VLLM_PYTHON:-}" ] && engines+=(vllm) && places+=(--vllm-python "$VLLM_PYTHON")
[ -n "${LLAMACPP:-}" ] && engines+=(llamacpp) && places+=(--llamacpp-binary "$LLAMACPP" --llamacpp-weights "${weights[@]}")
for kv_heads in 8 2; do
    python - "$models/llama-8-layers-$kv_heads-kv-heads" "$kv_heads" <<'PY'
import sys
from argparse import Namespace

sys.path.insert(0, ".")
from bench.end_to_end import make_model

shape = Namespace(hidden=1024, mlp=2816, layers=8, q_heads=8, kv_heads=int(sys.argv[2]), vocab=32000)
make_model(shape, sys.argv[1])
PY
    fastdecode bench throughput "$models/llama-8-layers-$kv_heads-kv-heads" --backend "${engines[@]}" "${places[@]}" \
        --num-prompts 64 --input-len 128 --output-len 64 --repeats 2 \
        --dtype "$dtype" --kv-cache-dtype "$kv_dtype" --kv-cache-memory 4GiB --output-json "$output"
done
