"""From a YAML file and dotted overrides to one validated :class:`Config`."""

from __future__ import annotations

import difflib
import os
import re
import time
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.types import FromCommandLine
from torchspec_hpc.config.yaml_io import dump_yaml, parse_yaml
from torchspec_hpc.errors import ConfigError

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Reads and validates a configuration.

    Args:
        path: YAML file. Relative paths in it start at its directory.
        overrides: ``section.key=value`` strings; values are YAML, relative paths
            in them start at the working directory.  ``site=NAME`` takes what neither states
            from ``sites/NAME.yaml`` beside the file.

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown, a value
            is wrong, or ``${env:NAME}`` names a variable that is not set.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no configuration file {file}", hint="check the path")
    raw = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds a {type(raw).__name__}", allowed="a mapping of sections")
    for override in overrides:
        _apply_override(raw, override)
    _apply_site(raw, file.resolve().parent)
    if raw.get("run_name") is None:
        raw["run_name"] = f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return parse_config(raw, base_dir=file.resolve().parent, source=str(file))


def _apply_site(raw: dict[str, Any], base_dir: Path) -> None:
    """Lays the configuration over that of its ``site``: a file, or a name of one in ``sites``."""
    site = raw.pop("site", None)
    if site is None:
        return
    if not isinstance(site, str):
        raise ConfigError(f"site = {site!r}", allowed="a YAML file, or the name of one in sites/")
    base = Path.cwd() if isinstance(site, FromCommandLine) else base_dir
    file = base / site if site.endswith(".yaml") else base_dir / "sites" / f"{site}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in (base_dir / "sites").glob("*.yaml")))
        raise ConfigError(f"site = {site}: there is no {file}", allowed=known or "a YAML file")
    profile = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    _fill_in(raw, profile if isinstance(profile, dict) else {})


def _fill_in(raw: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Adds what is not there; a section is filled in, a list or a value counts as a whole."""
    for key, value in defaults.items():
        mine = raw.setdefault(key, value)
        if isinstance(mine, dict) and isinstance(value, dict) and mine is not value:
            _fill_in(mine, value)


def parse_config(raw: Mapping[str, Any], *, base_dir: Path, source: str) -> Config:
    """Validates plain data.

    Args:
        raw: Nested mappings as YAML gives them.
        base_dir: Where relative paths start.
        source: What to call the data in errors.
    """
    try:
        return Config.model_validate(_expand_env(raw, source), context={"base_dir": base_dir})
    except ValidationError as error:
        raise ConfigError(_explain(error, source)) from None


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration; :func:`load_config` reads it back unchanged."""
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"override {override!r} has no '='", allowed="section.key=value, no spaces around ="
        )
    *sections, name = key.split(".")
    node = raw
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        node = child
    node[name] = _mark(parse_yaml(text, f"override {override!r}"))


def _mark(value: Any) -> Any:
    return FromCommandLine(value) if isinstance(value, str) else value


def _expand_env(value: Any, source: str) -> Any:
    if isinstance(value, Mapping):
        return {k: _expand_env(v, source) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_env(v, source) for v in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise ConfigError(
                f"{source}: environment variable {name} is not set",
                hint=f"export {name}=... or write ${{env:{name}:-default}}",
            )
        return found

    return type(value)(_ENV.sub(replace, value))


def _explain(error: ValidationError, source: str) -> str:
    lines = [f"{source} is not a valid configuration:"]
    for item in error.errors():
        loc = tuple(part for part in item["loc"] if isinstance(part, str))
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            keys = _keys_at(loc[:-1])
            near = difflib.get_close_matches(loc[-1], keys, n=1, cutoff=0.5)
            close = f"; did you mean {'.'.join((*loc[:-1], near[0]))}?" if near else ""
            lines.append(f"  {name}: unknown key{close} (allowed: {', '.join(sorted(keys))})")
        elif item["type"] == "missing":
            lines.append(f"  {name}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            # a relation between keys says itself what was found
            found = "" if isinstance(item["input"], Mapping) else f" (found {item['input']!r})"
            lines.append(f"  {name}: {message}{found}")
    return "\n".join(lines)


def _keys_at(loc: tuple[str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in loc:
        field = model.model_fields.get(part)
        nested = _model_in(field.annotation) if field else None
        if nested is None:
            break
        model = nested
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    candidates = (
        get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
