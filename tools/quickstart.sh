#!/usr/bin/env bash
# The main job on one machine without Slurm or GPU: sets up what it needs, trains an EAGLE-3 draft
# for SmolLM2-135M-Instruct, exports it, serves it in vLLM, and prints what it is worth.
#
#   bash tools/quickstart.sh [KEY=VALUE]...      e.g. training.num_train_steps=100
#
# About 15 minutes on 2 cores after the downloads (2 GB, once).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

started=$SECONDS
say() { printf '\n==> [%d min %02d s] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

say "1/5 environment (.venv)"
bash tools/setup_env.sh cpu
PATH=$PWD/.venv/bin:$PATH
# everything is local from here on
export HF_HUB_OFFLINE=1

say "2/5 target model (.cache)"
python tools/prepare_demo_model.py

say "3/5 training: vLLM engine -> Mooncake -> trainer"
name=quickstart-$(date +%Y%m%d-%H%M%S)
run=outputs/$name
torchspec-hpc run configs/demo.yaml "$@" output_dir=outputs "run_name=$name"

say "4/5 export"
torchspec-hpc export "$run" --dtype float32 --output "$run/export/trained"
torchspec-hpc export "$run" --dtype float32 --output "$run/export/untrained" --untrained

say "5/5 served in vLLM: without draft, with the untrained and with the trained one"
torchspec-hpc evaluate --target .cache/smollm2-135m-instruct \
  --prompts configs/demo/data/eval_prompts.jsonl --limit 24 --max-tokens 64 -k 3 \
  --draft "untrained=$run/export/untrained" --draft "trained=$run/export/trained" \
  --output "$run/evaluation.json"

say "result"
torchspec-hpc report "$run"
echo "run directory: $run   curves: tensorboard --logdir $run/tensorboard"
