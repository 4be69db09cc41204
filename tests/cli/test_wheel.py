"""The wheel contains all that it needs: installed alone, it trains."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_jd.finetune.example import MODEL, example_path

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling isn't installed to build the wheel with"),
]


def run(*command: object, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return a folder with only the wheel's contents."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    done = run(*pip, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_installed_wheel_trains(installed, train_file, tmp_path):
    where = run("-c", "import hf_jd; print(hf_jd.__file__)", folder=tmp_path, path=installed)
    assert where.stdout.startswith(str(installed))
    flags = ["--model_name_or_path", example_path(MODEL), "--train_file", train_file, "--output_dir", tmp_path / "run"]
    sizes = ["--max_steps", "1", "--max_length", "16", "--per_device_train_batch_size", "2", "--use_cpu"]
    done = run("-m", "hf_jd.cli", "finetune", *flags, *sizes, folder=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    done = run("-m", "hf_jd.cli", "report", tmp_path / "run", folder=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr  # Its template came with the wheel.


def test_the_missing_embedded_model_is_explained_in_one_sentence(installed, tmp_path):
    done = run("-m", "hf_jd.cli", "finetune", "--output_dir", tmp_path / "run", folder=tmp_path, path=installed)
    assert done.returncode == 2
    assert "clone the project" in done.stderr.splitlines()[-1]
