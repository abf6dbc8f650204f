"""What sections are made of: their base, and field types that know where a value came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, TypeAdapter, ValidationInfo

_BYTE_SIZE = TypeAdapter(ByteSize)


class Section(BaseModel):
    """Base of all sections: frozen, strict, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class FromCommandLine(str):
    """A string given as an override: its relative paths start at the working directory."""


def _base(value: str, info: ValidationInfo) -> Path:
    if isinstance(value, FromCommandLine) or not info.context:
        return Path.cwd()
    return Path(info.context["base_dir"])


def resolve_path(value: Any, info: ValidationInfo) -> Any:
    """An absolute path; relative ones start at the directory of the YAML file."""
    if not isinstance(value, str):
        return value
    return os.path.normpath(_base(value, info) / Path(value).expanduser())


def _resolve_model(value: Any, info: ValidationInfo) -> Any:
    """A directory if it is one or is spelled like one; otherwise a Hugging Face hub id."""
    if not isinstance(value, str):
        return value
    spelled_as_path = value.startswith(("./", "../", "/", "~")) or value in (".", "..")
    candidate = Path(os.path.normpath(_base(value, info) / Path(value).expanduser()))
    return str(candidate) if spelled_as_path or candidate.is_dir() else str(value)


def _parse_bytes(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("give a size such as 4GiB, 512MiB or a whole number of bytes")
    return int(_BYTE_SIZE.validate_python(value))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


#: A file or directory; relative ones start at the directory of the YAML file.
PathStr = Annotated[str, BeforeValidator(resolve_path)]
#: A model directory or a hub id.
ModelRef = Annotated[str, BeforeValidator(_resolve_model)]
#: A number of bytes, or a string such as ``4GiB``.
Bytes = Annotated[int, BeforeValidator(_parse_bytes)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_tuple)]
Strs = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
#: A list of names; one name needs no list.
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
#: Of weights and matrix products.
Dtype = Literal["bfloat16", "float16", "float32"]
