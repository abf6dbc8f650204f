from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.helpers import read_jsonl
from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.data.sources import dataset_key, files_of
from torchspec_hpc.errors import DataError

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# data",
    "data/train-00000-of-00002.jsonl": b'{"text": "a", "extra": {"kept": 1}}\n',
    "data/train-00001-of-00002.jsonl": b'{"text": "b"}\n',
    "data/test-00000.jsonl": b'{"text": "c"}\n',
}


class Hub(BaseHTTPRequestHandler):
    """What of the hub's protocol a data set of files needs."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/org/name"):
            siblings = [{"rfilename": name} for name in FILES]
            self.send(json.dumps({"id": "org/name", "sha": SHA, "siblings": siblings}).encode())
        elif (name := self.path.partition(f"/resolve/{SHA}/")[2]) in FILES:
            self.send(FILES[name])
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(hub: str, home: Path, reference: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its environment when it is imported."""
    code = (
        "import sys; from torchspec_hpc.data.sources import files_of\n"
        "print(*files_of(sys.argv[1]), sep='\\n')"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment["HF_HUB_DISABLE_XET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code, reference], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("reference", "texts"),
    [
        ("hf://org/name", ["a", "b"]),
        ("hf://org/name@main:train", ["a", "b"]),
        ("hf://org/name:test", ["c"]),
    ],
)
def test_a_data_set_of_the_hub(hub: str, tmp_path: Path, reference: str, texts: list[str]) -> None:
    done = ask(hub, tmp_path, reference)
    assert done.returncode == 0, done.stderr
    rows = [row for path in done.stdout.split() for row in read_jsonl(Path(path))]
    assert [row["text"] for row in rows] == texts
    assert texts != ["a", "b"] or rows[0]["extra"] == {"kept": 1}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://org/name:valid", "it has data/test-00000.jsonl, data/train-00000"),
        ("hf://org/other", "cannot get hf://org/other from the hub"),
    ],
)
def test_what_the_hub_does_not_have(hub: str, tmp_path: Path, reference: str, message: str) -> None:
    done = ask(hub, tmp_path, reference)
    assert done.returncode == 1
    assert message in done.stderr
    assert "DataError" in done.stderr


def test_without_network() -> None:
    with pytest.raises(DataError, match=r"cannot get hf://org/name from the hub(.|\n)*directory"):
        files_of("hf://org/name")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("org/name", "hf://org/name"),
        ("org/name@main:test", "hf://org/name@main:test"),
        ("hf://org/name", "hf://org/name"),
        ("data/train.jsonl", "/data/train.jsonl"),
        ("./org/name", "/org/name"),
        ("here/there", "/here/there"),
        ("/absolute/file.parquet", "/absolute/file.parquet"),
    ],
)
def test_hub_ids_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    wanted = found if found.startswith(("hf://", "/absolute")) else str(tmp_path) + found
    assert DatasetConfig(train_data_path=given).train_data_path == wanted


def test_keys(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (a, b):
        path.write_text("1\n")
    cache = tmp_path / "cache"
    assert dataset_key([a], cache, x=1) == dataset_key([b], cache, x=1)
    different = [dataset_key([a], cache, x=2), dataset_key([a, b], cache, x=1)]
    b.write_text("2\n")
    different += [dataset_key([b], cache, x=1), dataset_key([a], cache, x=1)]
    assert len(set(different)) == 4
