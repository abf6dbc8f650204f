"""How large the job is: nodes, tasks, CPUs and GPUs, from the configuration to ``sbatch``.

A *group* is what runs together: engines, or trainers.  A *component* is what Slurm allocates
together: with ``topology: het`` one for each group, otherwise one for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.slurm_schema import SlurmGroupConfig
from torchspec_hpc.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Size of one group.

    Attributes:
        num_nodes: Nodes it runs on.
        tasks_per_node: Engines of a node; for the trainers 1, the torchrun.
        num_tasks: Of all nodes; the last node may have fewer.
        gpus_per_node: Device slots of a node.
        options: Its section of ``slurm``.
    """

    num_nodes: int
    tasks_per_node: int
    num_tasks: int
    gpus_per_node: int
    options: SlurmGroupConfig

    @property
    def cpus_per_node(self) -> int:
        """CPUs of a node."""
        return self.tasks_per_node * self.options.cpus_per_task


@dataclass(frozen=True)
class Component:
    """What one part of the batch script's header asks for.

    Attributes:
        name: ``inference``, ``training``, or ``both``.
        title: The same in a sentence.
        num_nodes: Nodes.
        tasks_per_node: Tasks of a node.
        cpus_per_task: CPUs of a task.
        gpus_per_node: GPUs of a node.
        options: Partition and so on.
    """

    name: str
    title: str
    num_nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    options: SlurmGroupConfig


def inference_group(config: Config) -> Group:
    """The engines."""
    inference = config.inference
    return Group(
        inference.num_nodes,
        inference.ranks_per_node,
        inference.num_ranks,
        inference.num_gpus_per_node,
        config.slurm.inference,
    )


def training_group(config: Config) -> Group:
    """The trainers."""
    training = config.training
    num_nodes = training.training_num_nodes
    return Group(
        num_nodes, 1, num_nodes, training.training_num_gpus_per_node, config.slurm.training
    )


def components(config: Config) -> list[Component]:
    """What Slurm is asked for.

    Raises:
        ConfigError: The groups do not fit on one node although they are to share it.
    """
    inference, training = inference_group(config), training_group(config)
    first = "this script runs on its first node"
    if config.slurm.topology == "het":
        return [
            _component("inference", inference, f"Component 0, inference: {first}."),
            _component("training", training, "Component 1, training: one torchrun per node."),
        ]
    cpus = inference.cpus_per_node, training.cpus_per_node
    gpus = inference.gpus_per_node, training.gpus_per_node
    if config.slurm.topology == "single":
        num_nodes = inference.num_nodes + training.num_nodes
        num_cpus, num_gpus = max(cpus), max(gpus)
        engines = f"The first {inference.num_nodes}" if inference.num_nodes else "None"
        title = f"{engines} of these nodes for inference: {first}."
    else:
        num_nodes, num_cpus, num_gpus = 1, sum(cpus), sum(gpus)
        title = f"Both groups on one node, each with its own GPUs: {first}."
        if max(inference.num_nodes, training.num_nodes) > 1:
            raise ConfigError(
                f"slurm.topology = one_node with {inference.num_nodes} nodes for inference and "
                f"{training.num_nodes} for training",
                allowed="1 and 1",
                hint="set inference.inference_num_gpus_per_node and training.training_num_nodes",
            )
    return [
        Component(
            name="both",
            title=title,
            num_nodes=num_nodes,
            tasks_per_node=1,
            cpus_per_task=num_cpus,
            gpus_per_node=num_gpus,
            options=config.slurm.inference,  # the schema makes sure that both say the same
        )
    ]


def total_gpus(config: Config) -> int:
    """GPUs that the job is billed for; 0 where it asks for none."""
    parts = components(config)
    return sum(p.num_nodes * p.gpus_per_node for p in parts if p.options.gpus != "none")


def _component(name: str, group: Group, title: str) -> Component:
    return Component(
        name=name,
        title=title,
        num_nodes=group.num_nodes,
        tasks_per_node=group.tasks_per_node,
        cpus_per_task=group.options.cpus_per_task,
        gpus_per_node=group.gpus_per_node,
        options=group.options,
    )
