"""Where the hidden states of a run come from: engines, the disk, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

from torchspec_hpc.config import Config
from torchspec_hpc.data.dataset import TokenDataset
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.cache_plan import plan_cache, samples_between, sizes_of
from torchspec_hpc.training.cached_states import CachedStates
from torchspec_hpc.training.evaluation import num_held_out
from torchspec_hpc.training.main_rank import ask_main
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.state_cache import StateCache
from torchspec_hpc.transfer.feed import HiddenStateFeed


class StateSources:
    """Sources of hidden states, as the settings ask for them; every rank makes the same calls.

    Args:
        config: Of the run.
        spec: The target.
        aux_layers: Whose states there are, before those of the last layer.
        feed: Asks the engines; None: there are none.
        world: The training group.
        stack: Closes the sources in the end.
    """

    def __init__(
        self,
        config: Config,
        spec: TargetSpec,
        aux_layers: tuple[int, ...],
        feed: HiddenStateFeed | None,
        world: World,
        stack: ExitStack,
    ) -> None:
        self._config, self._feed, self._world, self._stack = config, feed, world, stack
        self._cache = partial(StateCache, config, spec, aux_layers, world.device.type)

    def training(
        self, dataset: TokenDataset, sampler: Sampler, start: int, end: int
    ) -> CachedStates | HiddenStateFeed:
        """Of the samples at the positions ``[start, end)`` of the stream.

        Raises:
            ConfigError: They are to be kept on a disk that has not the room, or are not there
                where there are no engines.
        """
        if self._config.inference.cache_dir is None:
            assert self._feed is not None  # the configuration has engines, or a cache
            return self._feed
        used = partial(samples_between, sampler, start, end, len(dataset))
        max_bytes = self._config.inference.cache_max_bytes
        return self._cached("training samples", dataset, used, max_bytes)

    def evaluation(self, dataset: TokenDataset) -> CachedStates:
        """Of the held-out samples, which are always kept.

        Raises:
            ConfigError: As for :meth:`training`.
        """
        used = partial(range, num_held_out(dataset, self._config.dataset.eval_max_tokens))
        return self._cached("held-out samples", dataset, used, None)

    def _cached(
        self,
        what: str,
        dataset: TokenDataset,
        used: Callable[[], Iterable[int]],
        max_bytes: int | None,
    ) -> CachedStates:
        """Plans, on the main rank, what is kept of the samples that are used."""
        cache, has_engines = self._cache(), self._feed is not None

        def plan() -> str:
            sizes = sizes_of(cache, dataset, used())
            return plan_cache(cache, what, sizes, max_bytes=max_bytes, has_engines=has_engines)

        states = CachedStates(cache, self._feed, ask_main(self._world, plan))
        self._stack.callback(states.close)
        return states
