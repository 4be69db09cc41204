"""The model card of a run: model, data, method, settings, and results by task."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_jd.arguments import JDArguments
from hf_jd.finetune.facts import TRAINING
from hf_jd.finetune.flags import DataArguments, ModelArguments
from hf_jd.finetune.results import Results
from hf_jd.finetune.table import evaluation_table
from hf_jd.report.verdict import setup

_TEXT = """---
{metadata}
---

# {title}

{setup}.

## Results

{results}

## Training

{settings}

Versions: {versions}

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

_ALWAYS = {"max_length", *TRAINING}
"""The settings to list even if they are the flags' defaults."""
_DEFAULTS = {field.name: field.default for flags in (ModelArguments, JDArguments) for field in fields(flags)}


def write_card(folder: Path, path: str, data: DataArguments, facts: dict[str, Any], results: Results) -> None:
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
    settings = {
        name: facts[name] for name in facts if name in _ALWAYS or facts[name] != _DEFAULTS.get(name, facts[name])
    }
    card = _TEXT.format(
        metadata=metadata.to_yaml(),
        title=folder.resolve().name,
        setup=setup(facts),
        results=evaluation_table(results) if results.evaluations else "It was not evaluated.",
        settings="\n".join(f"- `{name}`: {value}" for name, value in settings.items()),
        versions=", ".join(f"{name} {version(name)}" for name in ("hf-jd", "transformers", "peft", "torch")),
    )
    ModelCard(card).save(folder / "README.md")
