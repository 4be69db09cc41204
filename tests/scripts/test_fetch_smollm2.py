"""`scripts/fetch_smollm2.py`: what it refuses, and that it leaves no half a model."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_smollm2.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    return module


def test_an_existing_folder_is_left_alone(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path)])
    assert "is there already: name another folder" in capsys.readouterr().err


def test_without_gguf_the_error_says_what_to_install(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path / "model")])
    assert "`pip install gguf`" in capsys.readouterr().err


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "pip"), KeyboardInterrupt()])
def test_an_interrupted_download_leaves_nothing(error, script, tmp_path, capsys, monkeypatch):
    def fail(directory: Path) -> Path:
        (directory / "half").write_text("")
        raise error

    monkeypatch.setattr(script, "download", fail)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        script.main([str(tmp_path / "models" / "smollm2")])
    assert list((tmp_path / "models").iterdir()) == []


def test_the_folder_appears_whole(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "download", lambda directory: directory)
    monkeypatch.setattr(script, "convert", lambda source, folder: folder.mkdir())
    assert script.main([str(tmp_path / "smollm2")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
