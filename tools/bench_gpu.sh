#!/usr/bin/env bash
# Everything that has to be measured on a GPU, in under ten minutes, without network:
#
#   bash tools/bench_gpu.sh OUTPUT_DIR [tests] [step] [profile] [two]      default: tests step profile
#
# tests: fast paths against plain ones; step: the 8B-size train step, tables and JSON;
# profile: where its time goes; two: two GPUs, full_shard and replicate.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${1:?"usage: bash tools/bench_gpu.sh OUTPUT_DIR [tests] [step] [profile] [two]"}
shift
parts=${*:-tests step profile}
python=${PYTHON:-python3}
peak=${PEAK_TFLOPS:-989} # dense bfloat16 of an H100 or H200
mkdir -p "$out"

has() { [[ " $parts " == *" $1 "* ]]; }
bench() { "$python" tools/bench_trainer.py --preset 8b --rounds 3 --peak-tflops "$peak" "$@"; }

nvidia-smi -L
"$python" - <<'PY'
import time, torch
x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
y = torch.empty(2**30, device="cuda", dtype=torch.uint8)

def seconds(run, n=20):
    run(); torch.cuda.synchronize(); start = time.perf_counter()
    for _ in range(n): run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / n

print(f"ceilings: bfloat16 product of 8192 cubed {2 * 8192**3 / seconds(lambda: x @ x) / 1e12:.0f} "
      f"TFLOP/s; copy {2 * 2**30 / seconds(lambda: y.clone()) / 1e12:.2f} TB/s read and written; "
      f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
PY
status=0
if has tests; then
  "$python" -m pytest -q -p no:cacheprovider tests/drafts -k gpu 2>&1 | tail -5 || status=1
fi
if has step; then
  bench --tokens 2048 8192 16384 --document 2048 --compare eager flex checkpointing \
    --json "$out/pruned.json" || status=1
  bench --tokens 8192 --document 2048 --draft-vocab 151936 --compare eager \
    --json "$out/full.json" || status=1
  bench --tokens 8192 --data chat --json "$out/chat.json" || status=1
fi
if has profile; then
  bench --tokens 16384 --document 2048 --no-plain --profile || status=1
fi
if has two; then
  for fsdp in full_shard replicate; do
    for n in 1 2; do
      "$python" -m torch.distributed.run --standalone --nproc-per-node "$n" \
        tools/bench_trainer.py --preset 8b --rounds 5 --tokens 16384 --document 2048 \
        --fsdp "$fsdp" --no-plain --json "$out/${fsdp}_$n.json" || status=1
    done
  done
fi
exit "$status"
