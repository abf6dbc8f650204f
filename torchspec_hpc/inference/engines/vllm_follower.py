"""The other nodes of a vLLM engine that spans several: they only run vLLM's worker processes.

vLLM starts them the same way for ``vllm serve --headless --node-rank N`` (0.19 to 0.33); no
Ray is involved.
"""

from __future__ import annotations

import logging
import os

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.inference.engine_group import EngineGroup
from torchspec_hpc.inference.engines.base import EngineContext
from torchspec_hpc.inference.engines.vllm_arguments import all_arguments, environment

logger = logging.getLogger(__name__)


def follow(context: EngineContext) -> None:
    """Joins the engine's first process and works for it until it ends.

    Raises:
        DeadlineExceeded: The first process did not come up.
        TorchspecError: A worker process ended.
    """
    group = EngineGroup(context.run, context.endpoints, context.placement)
    session = group.join(context.config.control.engine_ready_s)
    group.watch(session)
    os.environ.update(environment(context))
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    arguments = all_arguments(context, session)
    config = EngineArgs(**arguments).create_engine_config(headless=True)
    executor = MultiprocExecutor(config, monitor_workers=False)
    logger.info("node %d of the engine works for %s", context.placement.node, session.address)
    executor.start_worker_monitor(inline=True)
    raise TorchspecError("a worker process of vLLM ended; see the messages above")
