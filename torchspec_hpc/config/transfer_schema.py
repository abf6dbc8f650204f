"""Settings of what connects both groups: the Mooncake store and the control plane."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torchspec_hpc.config.types import Bytes, Section

GiB = 1024**3
MiB = 1024**2


class MooncakeConfig(Section):
    """The store that carries hidden states from engines to trainers."""

    protocol: Literal["tcp", "rdma"] = Field("tcp", description="Of transfers between nodes.")
    device_name: str = Field(
        "", description="RDMA devices, comma-separated, e.g. mlx5_0; empty: what Mooncake finds."
    )
    global_segment_size: Bytes = Field(4 * GiB, description="Bytes per trainer rank.")
    local_buffer_size: Bytes = Field(512 * MiB, description="Bytes per client.")
    enable_gpu_direct: bool = Field(
        False, description="Engines' GPU memory is sent by RDMA, without a copy on the host."
    )
    kv_lease_ttl_s: float = Field(
        5.0, gt=0, description="Seconds that a read may take: the object stays in place that long."
    )
    checksum: bool = Field(
        False, description="Of every object, to find damage; up to a third of the speed."
    )
    master_port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    put_deadline_s: float = Field(300.0, gt=0, description="Longest wait for space, seconds.")


class ControlConfig(Section):
    """Deadlines of the control plane, in seconds. Every wait has one."""

    host: str | None = Field(
        None, description="Address that services bind to and are found at; null: the node's own."
    )
    port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    service_ready_s: float = Field(300.0, gt=0, description="Mooncake master and control store.")
    engine_ready_s: float = Field(1800.0, gt=0, description="First engine up, weights loaded.")
    engine_restarts: int = Field(
        5, ge=0, description="Starts of an engine that died, in a row; 0: it stays dead."
    )
    engines_lost_s: float = Field(
        1800.0, gt=0, description="No engine for so long: a checkpoint, and the run ends."
    )
    request_deadline_s: float = Field(600.0, gt=0, description="Then a request is sent again.")
    request_max_tries: int = Field(5, ge=1, description="Tries of one request; 1: no second one.")
    stop_grace_s: float | None = Field(
        None,
        gt=0,
        description="From stop asked to trainers gone; null: slurm.signal_before_s - 60, at least"
        " 30, in a Slurm job; 120 on this machine.",
    )
    heartbeat_s: float = Field(5.0, gt=0, description="Between an engine's signs of life.")
