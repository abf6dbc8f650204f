#!/usr/bin/env bash
# Runs the Slurm tests on Debian 13's Slurm (24.11), in a tree of its own beside this system:
#
#   bash tools/test_slurm_debian13.sh DIR [pytest arguments]
#
# DIR is made where it does not exist (mmdebstrap, some 300 MB). Needs root. The environment in
# .venv is used as it is; mounts are private to this process and end with it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=$(realpath -m "${1:?usage: bash tools/test_slurm_debian13.sh DIR [pytest arguments]}")
shift
[ $# -gt 0 ] || set -- -q tests/slurm

if [ ! -x "$tree/usr/sbin/slurmctld" ]; then
  packages=slurmctld,slurmd,slurm-client,munge,iproute2,procps,libibverbs1,libnuma1
  # what an interpreter that was built elsewhere links to
  packages+=,libffi8,libssl3t64,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8t64,libcurl4t64
  mmdebstrap --variant=apt --include="$packages" trixie "$tree"
fi
# the interpreter that .venv points to may live outside of /usr
prefix=$("$root/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')

# shellcheck disable=SC2016  # the variables are the inner shell's
exec unshare --mount --propagation private bash -euc '
  tree=$1 root=$2 prefix=$3
  shift 3
  mount --bind "$tree" "$tree"
  mount -t proc proc "$tree/proc"
  mount --rbind /sys "$tree/sys"
  mount --rbind /dev "$tree/dev"
  for folder in "$root" "$prefix"; do
    mkdir -p "$tree$folder"
    mount --bind "$folder" "$tree$folder"
  done
  cp /etc/hosts "$tree/etc/hosts"
  exec chroot "$tree" env -i HOME=/root OMP_NUM_THREADS=1 TORCHSPEC_REQUIRE_SLURM=1 \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    bash -c "cd \"\$0\" && exec .venv/bin/python -m pytest \"\$@\"" "$root" "$@"
' sh "$tree" "$root" "$prefix" "$@"
