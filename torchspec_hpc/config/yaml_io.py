"""YAML as people expect it: the YAML 1.2 core schema on top of PyYAML.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``on`` is true, ``010`` is
eight and ``12:30`` is 750.  None of that is what the author of a configuration
means.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from torchspec_hpc.errors import ConfigError


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of the YAML 1.2 core schema (section 10.3.2)."""


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _CoreLoader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
_CoreLoader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile("^$"))
)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))  # 010 is ten


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(
                f"key {key!r} is given twice (line {key_node.start_mark.line + 1})",
                hint="keep one of them",
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _float)
_CoreLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, source: str) -> Any:
    """Parses one YAML document.

    Args:
        text: The document.
        source: What to call it in errors, a path for instance.

    Raises:
        ConfigError: The text is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - derives from SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.what}", hint=error.hint) from None


def dump_yaml(value: Any) -> str:
    """Writes plain data so that :func:`parse_yaml` reads the same values back."""
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=False, width=100)
