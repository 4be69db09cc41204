"""The files in configs/, read by accelerate's own parser, by transformers, and by `hf-jd finetune`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_jd.finetune.run import parse

ROOT = Path(__file__).parents[2]
ENGINES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def launched(path: Path, *more: str):
    """Return the settings that `accelerate launch --config_file path` reads from the file and further arguments."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *more, "scripts/finetune.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[path.stem]
    arguments = launched(path)
    assert (arguments.num_processes, arguments.mixed_precision) == (8, "bf16")
    assert arguments.use_fsdp == (path.stem == "fsdp2")
    assert arguments.use_deepspeed == path.stem.startswith("zero")
    assert launched(path, "--num_processes", "4").num_processes == 4


def test_each_backend_has_a_file():
    assert [path.stem for path in ENGINES] == sorted(KINDS)


def test_fsdp_is_version_two_and_reshards_after_forward():
    environment = prepare_multi_gpu_env(launched(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
    with patch_environment(**{name: value for name, value in environment.items() if name.startswith("FSDP")}):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True


@pytest.mark.parametrize("stage", [2, 3])
def test_a_zero_file_sets_its_stage(stage):
    arguments = launched(ROOT / "configs" / "accelerate" / f"zero{stage}.yaml")
    assert arguments.zero_stage == stage
    assert arguments.zero3_init_flag is (stage == 3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_only_flags_of_finetune(path, tmp_path):
    settings = yaml.safe_load(path.read_text("utf-8"))
    flags = ["--output_dir", str(tmp_path), "--train_file", "data.jsonl", "--use_cpu", "true"]
    if "group" in path.stem:
        flags += ["--task_column", "task"]
    model, _, _, training = parse(flags, settings)
    assert model.full == path.stem.startswith("full")
    assert training.jd_objectives == ("group" if "group" in path.stem else "instance")
    assert training.jd_backward == ("two_pass" if path.stem.startswith("zero") else "one_pass")


@pytest.mark.parametrize("path", [*ENGINES, *RECIPES], ids=lambda path: path.stem)
def test_each_file_states_its_purpose_and_names_existing_files(path):
    text = path.read_text("utf-8")
    assert text.startswith("# ")
    for name in re.findall(r"(?:configs|scripts)/[\w./]+\w", text):
        assert (ROOT / name).exists(), name


def test_the_recipes_have_a_command_for_each_backend():
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    commands = re.findall(r"--config_file (configs/accelerate/\w+\.yaml) +scripts/finetune.py (\S+)", page)
    assert [Path(engine).stem for engine, _ in commands] == sorted(KINDS)
    assert all((ROOT / recipe).exists() for _, recipe in commands)
