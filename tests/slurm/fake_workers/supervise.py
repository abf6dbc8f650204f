"""The real supervisor over stand-ins: ``python -m tests.slurm.fake_workers.supervise RUN``."""

from __future__ import annotations

import os
import sys

from tests.slurm.fake_workers.plan import Plan
from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.slurm.local import LocalLauncher
from torchspec_hpc.slurm.srun import SlurmLauncher
from torchspec_hpc.slurm.steps import Modules
from torchspec_hpc.slurm.supervisor import supervise

PACKAGE = "tests.slurm.fake_workers"
FAKES = ["engine", "trainer", "torchrun", "control_store"]

run = RunDir(sys.argv[1])
config = load_config(run.config)
fakes = ["engine", "trainer"] if Plan.read(run).use_torch else FAKES
modules = Modules(**{name: f"{PACKAGE}.{name}" for name in fakes})
launcher = LocalLauncher if config.cluster == "local" else SlurmLauncher
sys.exit(supervise(run, lambda config: launcher(run, config, os.environ, modules)))
