"""torch.compile where it pays: small functions of tensors, whatever their lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def fused(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Returns ``function``, compiled for tensors of any length if asked for.

    Args:
        function: Of tensors and constants, without side effects.
        compiled: False returns it as it is.
    """
    return _compiled(function) if compiled else function


@cache  # one compiled function each, however often it is asked for
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
