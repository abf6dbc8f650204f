"""What a run has used, from its own history: no accounting is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.slurm.attempts import History, last_sign
from torchspec_hpc.slurm.record import require_run
from torchspec_hpc.slurm.shape import components, total_gpus
from torchspec_hpc.slurm.status import last_record


@dataclass(frozen=True)
class Cost:
    """What a run has used so far.

    Attributes:
        run: Its directory.
        num_attempts: Attempts so far, the one that runs included.
        num_nodes: Nodes of the job.
        num_gpus: GPUs of the job.
        hours: Of all attempts together.
        node_hours: Hours times nodes.
        gpu_hours: Hours times GPUs.
        steps: Last step that was logged.
        gpu_hours_per_1000_steps: None before the first step or without GPUs.
    """

    run: str
    num_attempts: int
    num_nodes: int
    num_gpus: int
    hours: float
    node_hours: float
    gpu_hours: float
    steps: int
    gpu_hours_per_1000_steps: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run_cost(run: RunDir) -> Cost:
    """Adds up the attempts of a run.

    The sizes are those of its present configuration.  An attempt that runs, or was killed
    before it could say so, ends for this sum when it last wrote to its logs or metrics.

    Raises:
        UserError: There is no such run.
    """
    require_run(run)
    config = load_config(run.config)
    attempts = History(run).attempts
    hours = sum((a.ended or last_sign(run, a)) - a.started for a in attempts) / 3600
    num_nodes, num_gpus = sum(c.num_nodes for c in components(config)), total_gpus(config)
    steps = int(last_record(run).get("step", 0))
    gpu_hours = hours * num_gpus
    return Cost(
        run=str(run.root),
        num_attempts=len(attempts),
        num_nodes=num_nodes,
        num_gpus=num_gpus,
        hours=hours,
        node_hours=hours * num_nodes,
        gpu_hours=gpu_hours,
        steps=steps,
        gpu_hours_per_1000_steps=1000 * gpu_hours / steps if steps and num_gpus else None,
    )
