"""Would this run start?  Asks Slurm, then looks at one node of each group."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torchspec_hpc
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.inputs import check_inputs
from torchspec_hpc.slurm.prepare import run_directory
from torchspec_hpc.slurm.probe import Check, check_folder
from torchspec_hpc.slurm.render import render_script, setup_lines
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.scheduler import check_submission, clean_environment
from torchspec_hpc.slurm.shape import Group, inference_group, training_group
from torchspec_hpc.slurm.submit import check_disjoint

_PROBE_MINUTES = 10


def preflight(config: Config, *, wait_s: int = 120) -> Iterator[tuple[str, Check]]:
    """Checks a configuration, the login node, and a node of each group.

    Args:
        config: The run's settings.
        wait_s: Longest wait for a node; 0: look at no node.

    Yields:
        Where (``here``, ``inference``, ``training``), and what was found there.
    """
    yield from (("here", check) for check in _here(config))
    if not wait_s:
        yield "nodes", Check("nodes", "warn", "not looked at")
        return
    groups = {"inference": inference_group(config), "training": training_group(config)}
    if not groups["inference"].num_nodes:  # states from disk need no engine
        del groups["inference"]
    first = next(iter(groups))  # runs the services
    for name, group in groups.items():
        options = [f"--engine={config.inference.engine}"] if name == "inference" else []
        if name == first:
            options += [f"--port={key}={port}" for key, port in _ports(config).items()]
        yield from ((name, check) for check in _on_a_node(config, group, options, wait_s))


def _here(config: Config) -> Iterator[Check]:
    run = run_directory(config)
    yield from check_folder(_nearest_folder(config))
    yield _attempt("configuration", check_inputs, config)
    yield _attempt("nodes", check_disjoint, config)
    # of partition, account, QOS, constraint and limits, nobody else knows better
    yield _attempt("sbatch --test-only", lambda c: check_submission(render_script(c, run)), config)


def _nearest_folder(config: Config) -> Path:
    """``output_dir``, or what it will be made in."""
    folder = Path(config.output_dir)
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _ports(config: Config) -> dict[str, int]:
    """Those that the configuration fixes."""
    ports = {
        "mooncake.master_port": config.mooncake.master_port,
        "control.port": config.control.port,
    }
    return {key: port for key, port in ports.items() if port}


def _attempt(name: str, check: Callable[[Config], str | None], config: Config) -> Check:
    try:
        start = check(config)
    except UserError as error:
        return Check(name, "fail", str(error))
    return Check(name, "ok", f"earliest start {start}" if start else "fits")


def _on_a_node(
    config: Config, group: Group, probe_options: list[str], wait_s: int
) -> Iterator[Check]:
    command = _srun(config, group, probe_options, wait_s)
    try:
        done = subprocess.run(
            command, text=True, capture_output=True, timeout=wait_s + 60 * _PROBE_MINUTES
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check("srun", "fail", str(error))
        return
    checks = [Check(**json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "{"]
    yield from checks
    if done.returncode or not checks:
        busy = "Unable to allocate resources" in done.stderr or "Immediate" in done.stderr
        text = f"no node within {wait_s} s" if busy else f"ended with {done.returncode}"
        last = " ".join(done.stderr.strip().splitlines()[-2:])
        yield Check("srun", "warn" if busy else "fail", f"{text}: {last}")


def _srun(config: Config, group: Group, probe_options: list[str], wait_s: int) -> list[str]:
    """What runs the probe with the group's own resources and runtime, on one node."""
    slurm, options, folder = config.slurm, group.options, _nearest_folder(config)
    gpus = f"{options.gpu_type}:{group.gpus_per_node}" if options.gpu_type else group.gpus_per_node
    values = {
        "job-name": "preflight",
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "partition": options.partition,
        "constraint": options.constraint,
        "mem": options.mem,
        "gres": f"gpu:{gpus}" if options.gpus == "gres" else None,
        "gpus-per-node": gpus if options.gpus == "gpus-per-node" else None,
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": group.cpus_per_node,
        "time": _PROBE_MINUTES,
        "immediate": wait_s,
    }
    given = [f"--{name}={value}" for name, value in values.items() if value is not None]
    # a container can see no folder that is not there yet
    config = config.model_copy(update={"output_dir": str(folder)})
    source = Path(torchspec_hpc.__file__).parents[1]
    runtime = Runtime(config, run_directory(config), code=source)
    num_gpus = 0 if options.gpus == "none" else group.gpus_per_node
    probe = [runtime.worker_python, "-m", "torchspec_hpc.slurm.probe", f"--folder={folder}"]
    probe += [f"--num-gpus={num_gpus}", *probe_options]
    srun = ["srun", *given, *options.extra, *runtime.srun_options]
    if slurm.runtime.kind == "pyxis":  # which begins within the container: without slurm.setup
        variables = {**slurm.environment, "PYTHONPATH": str(source)}
        return clean_environment(*srun, *runtime.enter(probe), **variables)
    lines = [  # as in the batch script
        "set -euo pipefail",
        *setup_lines(config, runtime),
        f"cd {shlex.quote(str(source))}",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
        f"exec {shlex.join(runtime.enter(probe))}",
    ]
    return clean_environment(*srun, "bash", "-c", "\n".join(lines))
