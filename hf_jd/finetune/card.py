"""The model card of a run: model, data, method, settings, and results by task, in the form of `card.md`."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_jd.arguments import JDArguments
from hf_jd.finetune.facts import TRAINING
from hf_jd.finetune.flags import DataArguments, ModelArguments
from hf_jd.finetune.table import evaluation_table
from hf_jd.report.history import History
from hf_jd.report.verdict import setup

_ALWAYS = {"max_length", *TRAINING}
"""The settings to list even if they are the flags' defaults."""
_DEFAULTS = {field.name: field.default for flags in (ModelArguments, JDArguments) for field in fields(flags)}


def write_card(folder: Path, path: str, data: DataArguments, facts: dict[str, Any], results: History) -> None:
    """Write README.md into a run's folder.

    Args:
        folder: The run's folder.
        path: The model's name, or its folder, which isn't named.
        data: The flags of the data.
        facts: The run's settings; see `facts_of`.
        results: The run's measurements.
    """
    metadata = ModelCardData(
        base_model=None if Path(path).exists() else path,
        library_name="transformers" if facts["full"] else "peft",
        pipeline_tag="text-generation",
        tags=["hf-jd", "stock" if facts["stock"] else "jacobian-descent", *([] if facts["full"] else ["lora"])],
        datasets=[data.dataset_name] if data.dataset_name and not Path(data.dataset_name).exists() else None,
    )
    listed = [name for name in facts if name in _ALWAYS or facts[name] != _DEFAULTS.get(name, facts[name])]
    ModelCard.from_template(
        metadata,
        str(Path(__file__).with_name("card.md")),
        title=folder.resolve().name,
        setup=setup(facts),
        results=evaluation_table(results) if results.evaluations else "It was not evaluated.",
        settings="\n".join(f"- `{name}`: {facts[name]}" for name in listed),
        versions=", ".join(f"{name} {version(name)}" for name in ("hf-jd", "transformers", "peft", "torch")),
    ).save(folder / "README.md")
