"""Settings of the Slurm job."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from torchspec_hpc.config.types import Section, Strs

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_TIME_FORMATS = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, UNLIMITED, INFINITE"


def time_limit_s(text: str) -> float:
    """Seconds of a wall time as ``sbatch --time`` reads it; no limit is infinity.

    Raises:
        ValueError: Slurm has no such format.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no time of Slurm's; allowed: {_TIME_FORMATS}")
    days, *numbers = (None if part is None else int(part) for part in match.groups())
    first, second, third = numbers
    if days is None and third is None:  # minutes, or minutes and seconds
        first, second, third = 0, first, second
    seconds = ((days or 0) * 24 + (first or 0)) * 3600 + (second or 0) * 60 + (third or 0)
    return seconds or math.inf  # zero asks for no limit


def _check_time(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # YAML reads bare minutes as a number
    if isinstance(value, str):
        time_limit_s(value)
    return value


def _text(value: Any) -> Any:
    """Numbers are fine as values of variables: ``NCCL_IB_TIMEOUT: 22``."""
    if not isinstance(value, dict):
        return value
    return {k: str(v) if type(v) in (int, float) else v for k, v in value.items()}


class RuntimeConfig(Section):
    """What the workers run in. Nothing but a prefix: the job is the same with all of them."""

    kind: Literal["none", "venv", "conda", "apptainer", "pyxis"] = Field(
        "none", description="none: slurm.python as it is. The last two are containers."
    )
    path: str | None = Field(
        None, description="The environment's directory, or the image; null for kind none."
    )
    python: str = Field("python3", description="Interpreter inside the image of a container.")
    mounts: Strs = Field(
        (), description="Directories a container sees besides those that the configuration names."
    )
    options: Strs = Field((), description="Further options of apptainer exec, or srun's for pyxis.")

    @model_validator(mode="after")
    def _has_a_path(self) -> RuntimeConfig:
        if (self.kind == "none") != (self.path is None):
            raise ValueError(
                f"kind = {self.kind} and path = {self.path!r}; allowed: a path with venv, conda, "
                "apptainer and pyxis, and none with none"
            )
        return self

    @property
    def is_container(self) -> bool:
        """Whether programs of the nodes are out of reach for the workers."""
        return self.kind in ("apptainer", "pyxis")


class SlurmGroupConfig(Section):
    """Resources of one of the two groups, per node."""

    partition: str | None = Field(None, description="null: the cluster's default.")
    constraint: str | None = Field(None, description="As in --constraint; null: any node.")
    cpus_per_task: int = Field(8, ge=1, description="CPUs of one engine or trainer.")
    mem: str | None = Field(
        None, description="Memory per node as Slurm spells it, e.g. 240G; null: the default."
    )
    gpus: Literal["gres", "gpus-per-node", "none"] = Field(
        "gres", description="How GPUs are asked for; none: a CPU partition."
    )
    gpu_type: str | None = Field(None, description="As in --gres=gpu:TYPE:N; null: any.")
    extra: Strs = Field((), description="Further sbatch options, without the leading #SBATCH.")


class SlurmConfig(Section):
    """The Slurm job. Only used when ``cluster`` is ``slurm``."""

    topology: Literal["het", "single", "one_node"] = Field(
        "het",
        description="het: a component for each group; single: one allocation, the groups on"
        " different nodes of it; one_node: both on one node, each with its own GPUs.",
    )
    account: str | None = Field(None, description="Who pays, as in --account; null: your default.")
    qos: str | None = Field(None, description="As in --qos; null: your default.")
    reservation: str | None = Field(None, description="As in --reservation; null: none.")
    time: Annotated[str, BeforeValidator(_check_time)] = Field(
        "04:00:00", description="Wall time of one attempt, as in --time; UNLIMITED: no limit."
    )
    signal_before_s: int = Field(
        600, ge=10, description="Warning before the time limit, seconds: time for a checkpoint."
    )
    resume: Literal["requeue", "chain", "none"] = Field(
        "requeue",
        description="How an unfinished run goes on: the job goes back into the queue, it submits"
        " a job that depends on it (where requeueing is forbidden), or not by itself.",
    )
    max_requeues: int = Field(99, ge=0, description="Of the whole run, after crashes too.")
    network_interface: str | None = Field(
        None,
        description="By which nodes reach each other: services, Mooncake, gloo, NCCL; null:"
        " Slurm's address of the node, and what gloo and NCCL choose.",
    )
    setup: Strs = Field((), description="Shell lines before anything else: module load ...")
    environment: Annotated[dict[str, str], BeforeValidator(_text)] = Field(
        default_factory=dict, description="Variables of all processes, e.g. NCCL_*, TMPDIR."
    )
    runtime: RuntimeConfig = RuntimeConfig()
    python: str | None = Field(
        None, description="Interpreter on the nodes; null: this one, or that of a venv or conda."
    )
    inference: SlurmGroupConfig = SlurmGroupConfig()
    training: SlurmGroupConfig = SlurmGroupConfig()

    @model_validator(mode="after")
    def _warns_in_time(self) -> SlurmConfig:
        if self.signal_before_s >= (limit_s := time_limit_s(self.time)):
            raise ValueError(
                f"signal_before_s = {self.signal_before_s} is not less than time = {self.time}; "
                f"allowed: less than {limit_s:.0f} seconds, or a longer time"
            )
        return self

    @model_validator(mode="after")
    def _agrees(self) -> SlurmConfig:
        """One allocation has one kind of node."""
        if self.topology == "het":
            return self
        for key in ("partition", "constraint", "mem", "gpus", "gpu_type", "extra"):
            found = getattr(self.inference, key), getattr(self.training, key)
            if found[0] != found[1]:
                raise ValueError(
                    f"inference.{key} = {found[0]!r} and training.{key} = {found[1]!r} differ; "
                    f"allowed with topology = {self.topology}: the same for both"
                )
        return self
