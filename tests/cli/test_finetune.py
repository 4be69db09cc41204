"""`hf-jd finetune` on the embedded model, end to end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_jd.cli import main
from hf_jd.finetune.example import MODEL, example_path
from hf_jd.report.history import mean, read_history


@pytest.fixture(scope="module")
def lora_run(finetune, train_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    return finetune(folder, "--validation_file", str(train_file), "--eval_on_start", "--eval_strategy", "epoch")


def test_adapter_is_trained_and_reloads(lora_run):
    tensors = load_file(lora_run / "adapter_model.safetensors")
    assert max(tensor.abs().max() for name, tensor in tensors.items() if "lora_B" in name) > 0
    tokenizer = AutoTokenizer.from_pretrained(lora_run)
    model = AutoPeftModelForCausalLM.from_pretrained(lora_run)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=ids).logits
    with torch.no_grad():
        after = model(input_ids=ids).logits
    assert after.dtype == torch.float32
    assert (after - before).abs().max() > 1e-4


def test_evaluation_weights_and_conflicts_are_by_task(lora_run):
    results = read_history(lora_run)
    assert results.tasks == ["story", "sum"]
    assert results.steps == 2
    for task in results.tasks:
        assert [step for step, _ in results.evaluations[task]] == [0, 2]
        assert all(0 <= accuracy <= 1 for _, accuracy in results.accuracies[task])
        assert mean(results.against[task]) in (0, 0.5, 1)
    assert sum(map(mean, results.weights.values())) == pytest.approx(1)


def test_the_loss_after_training_is_the_mean_over_tokens_whatever_the_batch(lora_run, train_file, tmp_path, capsys):
    losses = []
    for size in ("1", "3", "8"):
        flags = [
            "--train_file",
            train_file,
            "--validation_file",
            train_file,
            "--max_length",
            "16",
            "--do_train",
            "false",
        ]
        flags += ["--per_device_eval_batch_size", size, "--output_dir", tmp_path / size, "--disable_tqdm", "true"]
        assert main(["finetune", "--model_name_or_path", str(lora_run), *map(str, flags)]) == 0
        losses.append(capsys.readouterr().out.splitlines()[-1])
        assert not (tmp_path / size / "adapter_model.safetensors").exists()
    assert losses[0] == losses[1] == losses[2]
    assert losses[0].startswith("| all")


def test_card_tells_the_weighting_and_the_results(lora_run):
    card = (lora_run / "README.md").read_text("utf-8")
    assert "stories15m (LoRA, r = 8) on train.jsonl; upgrad, one objective per example; learning rate 0.001." in card
    assert "- `max_length`: 16\n" in card
    assert "`dtype`" not in card  # It is the default.
    assert "| story |" in card
    assert "loss before" in card
    assert card.startswith("---\n")
    assert str(lora_run.parent) not in card


def test_full_finetuning_saves_the_model(finetune, tmp_path):
    folder = finetune(tmp_path / "full", "--full", "--jd_objectives", "group", "--jd_group_reduction", "mean")
    trained = AutoModelForCausalLM.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(example_path(MODEL))
    assert (trained.model.norm.weight - before.model.norm.weight).abs().max() > 0
    assert "(all parameters) on train.jsonl" in (folder / "README.md").read_text("utf-8")


def test_dora_and_whole_modules_beside_it(finetune, tmp_path):
    flags = ["--use_dora", "--modules_to_save", "norm", "--lora_target_modules", "q_proj", "--revision", "main"]
    tensors = load_file(finetune(tmp_path / "run", *flags) / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in tensors)
    assert "base_model.model.model.norm.weight" in tensors


def test_an_adapter_is_trained_further(finetune, lora_run, tmp_path):
    before = load_file(lora_run / "adapter_model.safetensors")
    folder = finetune(tmp_path / "run", "--model_name_or_path", str(lora_run), "--learning_rate", "1e-6")
    after = load_file(folder / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all((after[name] - before[name]).abs().max() < 1e-5 for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_flags_override_the_file(finetune, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("jd_weighting: mgda\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\nlearning_rate: 3e-3\n")
    folder = finetune(tmp_path / "run", "--lora_r", "3", config=config)
    adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert adapter["r"] == 3
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    assert "- `jd_weighting`: mgda" in (folder / "README.md").read_text("utf-8")


def test_stock_trainer_and_mean_make_the_same_model(finetune, tmp_path):
    stock = load_file(finetune(tmp_path / "stock", "--stock") / "adapter_model.safetensors")
    mean = load_file(finetune(tmp_path / "mean", "--jd_weighting", "mean") / "adapter_model.safetensors")
    # In float32, AdamW amplifies the rounding errors of tiny gradients; other tests check exactness in float64.
    for name, tensor in stock.items():
        assert (mean[name] - tensor).abs().mean() < 1e-5
    assert "; transformers' Trainer; " in (tmp_path / "stock" / "README.md").read_text("utf-8")


def test_resumes_its_own_newest_checkpoint(finetune, tmp_path):
    whole = finetune(tmp_path / "run", "--save_strategy", "steps", "--save_steps", "1")
    before = load_file(whole / "adapter_model.safetensors")
    shutil.rmtree(whole / "checkpoint-2")
    resumed = finetune(whole, "--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "last")
    after = load_file(resumed / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


SAVING = ["--save_strategy", "steps", "--save_steps", "1"]
LAST = [*SAVING, "--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def saved_run(finetune, tmp_path_factory) -> Path:
    return finetune(tmp_path_factory.mktemp("runs") / "saved", *SAVING)


@pytest.fixture
def resumed(monkeypatch) -> list[str | None]:
    """Record the checkpoint of each resumed run."""
    asked: list[str | None] = []
    train = Trainer.train

    def note(self, resume_from_checkpoint=None, *args, **kwargs):
        asked.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return train(self, resume_from_checkpoint, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", note)
    return asked


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("harm", "flags"),
    [
        (lambda last: cut_off(last / "optimizer.pt"), []),
        (lambda last: cut_off(last / "adapter_model.safetensors"), ["--stock"]),
        (lambda last: (last / "trainer_state.json").unlink(), []),
        (lambda last: (last / "rng_state.pth").unlink(), ["--stock"]),
        (lambda last: cut_off(last / "trainer_state.json"), ["--jd_weighting", "mean"]),
        (lambda last: (last.parent / "checkpoint-10").mkdir(), []),
    ],
)
def test_resumes_its_newest_whole_checkpoint(harm, flags, finetune, saved_run, resumed, tmp_path, caplog):
    folder = shutil.copytree(saved_run, tmp_path / "run")
    harm(folder / "checkpoint-2")
    newest = "checkpoint-2" if (folder / "checkpoint-10").exists() else "checkpoint-1"
    finetune(folder, *LAST, *flags)
    assert resumed == [newest]
    assert f"Skipping checkpoint-{10 if newest == 'checkpoint-2' else 2}, which is incomplete" in caplog.text


def test_a_run_that_goes_on_otherwise_says_so(finetune, saved_run, tmp_path, caplog):
    folder = shutil.copytree(saved_run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-2")
    finetune(folder, *LAST, "--jd_weighting", "mgda")
    assert "began with --jd_weighting upgrad, and continues with mgda" in caplog.text
    assert caplog.text.count("continues with") == 1


def test_ctrl_c_tells_how_to_go_on(train_file, tmp_path, monkeypatch, capsys):
    def stop(self, *args, **kwargs):
        (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stop)
    assert main(["finetune", "--train_file", str(train_file), "--output_dir", str(tmp_path / "run")]) == 130
    assert "--resume_from_checkpoint last" in capsys.readouterr().err


def test_short_data_gives_a_curve_and_a_column_before(train_file, tmp_path, capsys):
    flags = ["--train_file", train_file, "--validation_file", train_file, "--output_dir", tmp_path / "run"]
    sizes = ["--max_length", "16", "--max_steps", "4", "--per_device_train_batch_size", "4", "--task_column", "task"]
    assert main(["finetune", *map(str, flags), *sizes, "--disable_tqdm", "true"]) == 0
    printed = capsys.readouterr().out
    assert "| task  | loss before | loss after |" in printed
    assert "step 1: loss " in printed
    results = read_history(tmp_path / "run")
    assert [step for step, _ in results.evaluations["sum"]] == [0, 1, 2, 3, 4]
    assert [step for step, _ in results.weights["sum"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("flags", [[], ["--stock"]], ids=["ours", "stock"])
def test_without_a_whole_checkpoint_it_says_that_it_starts_anew(flags, finetune, saved_run, resumed, tmp_path, caplog):
    folder = shutil.copytree(saved_run, tmp_path / "run")
    for name in ("checkpoint-1", "checkpoint-2"):
        cut_off(folder / name / "adapter_model.safetensors")
    finetune(folder, *LAST, *flags)
    assert resumed == [None]
    assert "No checkpoint is complete: training starts from the beginning" in caplog.text
    assert read_history(folder).steps == 2


def test_a_named_checkpoint_that_is_cut_off_is_refused(saved_run, train_file, tmp_path, capsys):
    folder = shutil.copytree(saved_run, tmp_path / "run")
    cut_off(folder / "checkpoint-2" / "adapter_model.safetensors")
    flags = ["--train_file", train_file, "--output_dir", folder, "--resume_from_checkpoint", folder / "checkpoint-2"]
    assert main(["finetune", *map(str, flags)]) == 2
    assert "its adapter_model.safetensors is incomplete. Use another one, or" in capsys.readouterr().err


def test_overwriting_removes_the_other_run(finetune, tmp_path):
    folder = finetune(tmp_path / "run", "--save_strategy", "steps", "--save_steps", "2")
    (folder / "notes.txt").write_text("mine")
    finetune(folder, "--overwrite_output_dir")
    assert not (folder / "checkpoint-2").exists()
    assert (folder / "notes.txt").exists()


@pytest.mark.slow
def test_script_runs_under_accelerate_with_two_processes(train_file, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "finetune.py"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    flags = ["--train_file", train_file, "--validation_file", train_file, "--task_column", "task", "--max_length", "16"]
    sizes = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "--disable_tqdm", "true"]
    command = [*launch, "--main_process_port", "0", script, *flags, *sizes, "--output_dir", tmp_path / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_history(tmp_path / "run").steps == 2
    assert done.stdout.count("Saved in") == 1
