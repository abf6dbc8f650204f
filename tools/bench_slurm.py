"""Times of the command line and of a job's life, on the cluster that the tests start.

    python -m tools.bench_slurm [--pending 1000] [--repeats 5]

Prints one table: wall time of each command as a user types it, with an empty queue and with many
waiting jobs, and seconds from ``submit`` or a requeue to the first step with a tiny target.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import make_tiny_target
from tests.e2e.conftest import losses, tiny_config
from tests.helpers import conversations, write_jsonl
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.configs import small_config
from torchspec_hpc.config import save_config
from torchspec_hpc.config.yaml_io import dump_yaml

PROGRAM = Path(sys.executable).with_name("torchspec-hpc")


def torchspec_hpc(cluster: Cluster, *argv: str | Path) -> str:
    """Runs a command as a user does."""
    done = subprocess.run([PROGRAM, *argv], env=cluster.env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def held_config(folder: Path, name: str) -> Path:
    """A configuration whose job stays in the queue."""
    groups = {
        "inference": {"partition": "infer", "mem": "200M", "extra": ["--hold"]},
        "training": {"partition": "train", "mem": "300M"},
    }
    path = folder / f"{name}.yaml"
    config = small_config(folder / "runs", **groups)
    save_config(config.model_copy(update={"run_name": name}), path)
    return path


def command_times(
    cluster: Cluster, folder: Path, label: str, repeats: int
) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each command, the least of all repeats: the machine is shared."""
    times: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, *argv: str | Path) -> str:
        start, cpu = time.perf_counter(), children_cpu_s()
        said = torchspec_hpc(cluster, *argv)
        wall_s = time.perf_counter() - start
        times.setdefault(name, []).append((wall_s, children_cpu_s() - cpu))
        return said

    for i in range(repeats):
        config = held_config(folder, f"{label}-{i}")
        timed("--help", "--help")
        timed("render", "render", config)
        timed("plan", "plan", config)
        run = Path(json.loads(timed("submit", "submit", config, "--json"))["run"])
        timed("status", "status", run)
        timed("status --queue", "status", run, "--queue")
        timed("logs --role batch", "logs", make_log(run), "--role", "batch")
        timed("cost", "cost", run)
        timed("cancel", "cancel", run)
        timed("resume", "resume", run)
        torchspec_hpc(cluster, "cancel", run, "--now")
    return {
        name: (min(wall for wall, _ in values), min(cpu for _, cpu in values))
        for name, values in times.items()
    }


def children_cpu_s() -> float:
    """CPU time of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_log(run: Path) -> Path:
    """A line of the batch script's log, which a job that waits has not written."""
    (run / "job" / "slurm-1.out").write_text("a line\n")
    return run


@contextmanager
def many_jobs(cluster: Cluster, num: int) -> Iterator[None]:
    """So many jobs of one component in the queue."""
    script = f"for i in $(seq {num}); do sbatch -o /dev/null --begin=now+1day --wrap=true; done"
    subprocess.run(["sh", "-ec", script], env=cluster.env, check=True, capture_output=True)
    try:
        yield
    finally:
        cluster.run("scancel", "--state=PENDING", "--user=root")


def life_times(cluster: Cluster, folder: Path) -> dict[str, float]:
    """Seconds of a real run: one engine of Transformers, one trainer, a tiny target."""
    target = make_tiny_target(folder / "target")
    data = write_jsonl(folder / "data.jsonl", conversations(64))
    config = tiny_config(folder / "runs", target, data)
    config["cluster"], config["training"]["num_train_steps"] = "slurm", 200
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(config))
    start = time.monotonic()
    said = json.loads(torchspec_hpc(cluster, "submit", path, "--json"))
    run, job = Path(said["run"]), said["job_id"]
    logs = run / "logs"
    times = {
        "submit returns": time.monotonic() - start,
        "submit to the supervisor": since(start, (logs / "attempt_0" / "supervisor.log").is_file),
        "submit to the first step": since(start, lambda: has_step(run, 1)),
    }
    wait_for(lambda: has_step(run, 20), "step 20", 300)
    start = time.monotonic()
    cluster.warn(job)
    times["warning to the end of the attempt"] = since(
        start, lambda: cluster.job(job)["JobState"] != "RUNNING"
    )
    done = max(losses(run))
    times["warning to the next attempt"] = since(
        start, (logs / "attempt_1" / "supervisor.log").is_file
    )
    times["warning to a new step"] = since(start, lambda: max(losses(run)) > done)
    cluster.wait_state(job, timeout_s=600)
    return times


def since(start: float, condition: Callable[[], bool]) -> float:
    """Seconds from then until it holds."""
    wait_for(condition, "it", 300)
    return time.monotonic() - start


def has_step(run: Path, step: int) -> bool:
    """Whether this step is logged."""
    return (run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pending", type=int, default=1000, help="jobs in the queue")
    parser.add_argument("--repeats", type=int, default=5, help="of each command")
    options = parser.parse_args()
    with Cluster() as cluster, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        empty = command_times(cluster, folder, "empty", options.repeats)
        with many_jobs(cluster, options.pending):
            full = command_times(cluster, folder, "full", options.repeats)
        print(f"| command | empty queue, s (CPU) | {options.pending} waiting jobs, s (CPU) |")
        print("|---|---|---|")
        for command, (wall, cpu) in empty.items():
            full_wall, full_cpu = full[command]
            print(f"| `{command}` | {wall:.2f} ({cpu:.2f}) | {full_wall:.2f} ({full_cpu:.2f}) |")
        print("\n| event | s |\n|---|---|")
        for event, seconds in life_times(cluster, folder).items():
            print(f"| {event} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
