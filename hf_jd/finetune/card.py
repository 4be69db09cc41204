"""The model card of a run: model, data, method, and results by task."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hf_jd import JDTrainingArguments
from hf_jd.finetune.facts import source_of
from hf_jd.finetune.flags import DataArguments, ModelArguments, RunArguments
from hf_jd.finetune.results import Results
from hf_jd.finetune.table import evaluation_table

_TEXT = """---
{metadata}
---

# {title}

{what} of `{base}`, trained with {how}.

## Results

{results}

## Training

{training}

- Versions: {versions}

## Citation

```bibtex
@article{{quinton2024jacobian,
  title = {{Jacobian Descent for Multi-Objective Optimization}},
  author = {{Quinton, Pierre and Rey, Valérian}},
  journal = {{arXiv preprint arXiv:2406.16232}},
  year = {{2024}}
}}
```
"""

_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
    "max_grad_norm",
    "seed",
)


def write_card(
    folder: Path,
    base: str,
    model: ModelArguments,
    data: DataArguments,
    run: RunArguments,
    training: JDTrainingArguments,
    results: Results,
) -> None:
    """Write README.md into a run's folder."""
    is_folder = Path(base).exists()
    name = Path(base).name if is_folder else base
    metadata = ModelCardData(
        base_model=None if is_folder else base,
        library_name="transformers" if model.full else "peft",
        pipeline_tag="text-generation",
        tags=["hf-jd", "stock" if run.stock else "jacobian-descent", *([] if model.full else ["lora"])],
        datasets=[data.dataset_name] if data.dataset_name and not Path(data.dataset_name).exists() else None,
    )
    card = _TEXT.format(
        metadata=metadata.to_yaml(),
        title=folder.resolve().name,
        what="All parameters" if model.full else f"A LoRA adapter (r = {model.lora_r}, alpha = {model.lora_alpha})",
        base=name,
        how=_method(run, training),
        results=evaluation_table(results) if results.evaluations else "It was not evaluated.",
        training="\n".join(_settings(data, training)),
        versions=", ".join(f"{name} {version(name)}" for name in ("hf-jd", "transformers", "peft", "torch")),
    )
    ModelCard(card).save(folder / "README.md")


def _method(run: RunArguments, training: JDTrainingArguments) -> str:
    if run.stock:
        return "transformers' `Trainer`"
    arguments = f" ({', '.join(training.jd_weighting_args)})" if training.jd_weighting_args else ""
    objectives = "instance" if training.jd_objectives == "instance" else f"`{training.jd_group_column}`"
    return (
        f"Jacobian descent: the weighting `{training.jd_weighting}`{arguments}, with one objective per {objectives} of "
        "a batch"
    )


def _settings(data: DataArguments, training: JDTrainingArguments) -> list[str]:
    lines = [f"- Data: {source_of(data)}, at most {data.max_length} tokens per example"]
    for name in _SETTINGS:
        if name in ("max_steps", "num_train_epochs") and (name == "max_steps") != (training.max_steps > 0):
            continue
        value = getattr(training, name)
        lines.append(f"- `{name}`: {getattr(value, 'value', value)}")
    return lines
