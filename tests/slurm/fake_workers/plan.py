"""What the stand-ins of a run do: ``<run>/fake.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torchspec_hpc.config.rundir import RunDir, write_atomic


@dataclass(frozen=True)
class Plan:
    """Of one run, for all its attempts.

    Attributes:
        num_steps: Steps until done.
        step_s: Seconds a step takes.
        save_every: Steps between checkpoints; 0: only when asked to stop, and at the end.
        crash_at: A trainer ends with `crash_code` in this step; -1: never.
        crash_code: 2 is told as the user's mistake.
        deaf: The trainers do not look at the stop file.
        engine: ``serve``, or how it fails: ``die``, ``die later``, ``user error``, ``never ready``;
            ``die twice`` and then serve; ``one user error``: rank 0's, the others serve.
        leave_orphan: The engine starts a process that detaches itself.
        use_torch: Real torchrun and control store: slower by what torch takes to load.
    """

    num_steps: int = 5
    step_s: float = 0.02
    save_every: int = 0
    crash_at: int = -1
    crash_code: int = 1
    deaf: bool = False
    engine: str = "serve"
    leave_orphan: bool = False
    use_torch: bool = False

    @classmethod
    def read(cls, run: RunDir) -> Plan:
        return cls(**json.loads((run.root / "fake.json").read_text()))

    def write(self, run: RunDir) -> None:
        write_atomic(run.root / "fake.json", asdict(self))
