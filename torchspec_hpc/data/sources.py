"""Where data are: a file, a directory, or a data set of the Hugging Face hub; and what is in them.

A data set is the list of its files. Files of the hub are downloaded into the hub's cache one by
one and then read like any others, so no column is dropped and nothing is converted.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from torchspec_hpc.config.dataset_schema import HUB
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.data.rows import FORMATS
from torchspec_hpc.errors import DataError

_HUB_REF = re.compile(r"hf://(?P<repo>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")
# a file may change twice within one tick of the clock of its file system
_CLOCK_TICK_NS = 2_000_000_000


def files_of(reference: str) -> list[Path]:
    """The files of a data set, in the order in which they are read.

    Args:
        reference: A file, a directory (all of its data files, by name), or
            ``hf://organisation/name[@revision][:split]``.

    Raises:
        DataError: There is nothing to read.
    """
    if reference.startswith(HUB):
        return _hub_files(reference)
    path = Path(reference)
    if not path.is_dir():
        if not path.is_file():
            raise DataError(
                f"there is no data file {path}",
                allowed=f"a file ({', '.join(FORMATS)}), a directory of them, or a hub id",
                hint="check the path in the dataset section",
            )
        return [path]
    found = [p for p in path.rglob("*") if p.suffix in FORMATS and p.is_file()]
    files = sorted(p for p in found if not _is_metadata(p.relative_to(path)))
    if not files:
        raise DataError(f"the directory {path} has no data files", allowed=", ".join(FORMATS))
    return files


def _is_metadata(path: Path) -> bool:
    """Hidden files, and what Hugging Face datasets write beside their tables."""
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.name in ("dataset_info.json", "state.json", "dataset_dict.json")


def _hub_files(reference: str) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    parts = _HUB_REF.fullmatch(reference)
    if parts is None:
        raise DataError(
            f"data set {reference!r}", allowed="hf://organisation/name[@revision][:split]"
        )
    try:
        info = HfApi().dataset_info(parts["repo"], revision=parts["revision"])
        names = [file.rfilename for file in info.siblings or ()]
        return [
            Path(hf_hub_download(info.id, name, repo_type="dataset", revision=info.sha))
            for name in _of_split(names, parts["split"], reference)
        ]
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise DataError(
            f"cannot get {reference} from the hub: {error}",
            hint="check the name, HF_TOKEN and the network; or download it and give its directory",
        ) from error


def _of_split(names: list[str], split: str | None, reference: str) -> list[str]:
    """The data files of a split; without one ``train``, or all if no file is called so."""
    data = sorted(n for n in names if Path(n).suffix in FORMATS and not _is_metadata(Path(n)))
    wanted = re.compile(rf"(^|[/_.-]){split or 'train'}([/_.-]|$)")
    chosen = [name for name in data if wanted.search(name)]
    if not chosen and split is None:
        chosen = data
    if not chosen:
        raise DataError(
            f"{reference} has no such data files; it has {', '.join(data) or 'none'}",
            allowed=f"files of {', '.join(FORMATS)} with the split in their name",
        )
    return chosen


def dataset_key(files: list[Path], cache_dir: Path, **settings: Any) -> str:
    """Names the samples that files and settings give.

    Args:
        files: Their bytes count, their names do not.
        cache_dir: Remembers the digests of files that have not changed since.
        settings: All else that the samples depend on; plain values.
    """
    contents = [(path.suffix, _digest(path, cache_dir)) for path in files]
    text = json.dumps({"files": contents} | settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def signature(path: Path) -> tuple[int, int, int]:
    """Changes when the file is written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _digest(path: Path, cache_dir: Path) -> str:
    """SHA-256 of a file; read again only if it may have changed."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    memory = cache_dir / "digests" / f"{name}.json"
    now = [*signature(path)]
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["signature"] == now:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError):
        pass  # not known yet, or half of it: it is read below
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hashed.update(chunk)
    digest = hashed.hexdigest()
    if [*signature(path)] == now and time.time_ns() - path.stat().st_mtime_ns > _CLOCK_TICK_NS:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, {"signature": now, "sha256": digest, "path": str(path)})
    return digest
