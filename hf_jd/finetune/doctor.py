"""`hf-jd doctor`: check every parameter's rows on a model and data, and show what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from hf_jd.batches import without_groups
from hf_jd.finetune.data import load_examples
from hf_jd.finetune.model import model_path
from hf_jd.finetune.parser import read_settings, split_settings
from hf_jd.finetune.run import build_trainer, parse
from hf_jd.gramian import RowCheck, check_rows
from hf_jd.trainer import JDTrainer
from hf_jd.trainer.splitting.unreduced import by_name

DESCRIPTION = "Check on one batch that every parameter's rows are right, and what they cost."


def main(argv: Sequence[str]) -> int:
    """Run `hf-jd doctor` with the flags of `hf-jd finetune`; nothing is trained or written.

    Returns:
        The exit code: 1 if a parameter's rows are wrong.
    """
    flags, file = split_settings(argv)
    settings = {} if file is None else dict(read_settings(file))
    with TemporaryDirectory() as folder:  # Trainer creates its output folder at once.
        findings = diagnose(flags, settings | {"output_dir": folder})
    print(report(findings))
    return 0 if all(finding.right for finding in findings) else 1


def diagnose(flags: Sequence[str], settings: Mapping[str, Any]) -> list[RowCheck]:
    """Check the rows of one training batch.

    Args:
        flags: Flags of `hf-jd finetune`, which override the settings.
        settings: Values by the flags' names.
    """
    model, data, run, training = parse(flags, settings, "doctor", DESCRIPTION)
    trainer = build_trainer(model_path(model), model, data, run, training, load_examples(data))
    assert isinstance(trainer, JDTrainer)
    assert trainer.model is not None
    network = trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))

    def losses() -> Tensor:
        with trainer.compute_loss_context_manager():
            unreduced = trainer.compute_losses(network, trainer._prepare_inputs(without_groups(batch)))
        ((losses,), (counted,)) = (named.values() for named in by_name(unreduced))
        return losses.masked_fill(~counted, 0).flatten(1).sum(1)

    return check_rows(network, losses)


def report(findings: Sequence[RowCheck]) -> str:
    """Format the findings: count parameters in closed form, and name all others."""
    tiers = Counter(finding.tier for finding in findings)
    lines = [str(finding) for finding in findings if finding.tier != 1 or not finding.right]
    wrong = sum(not finding.right for finding in findings)
    summary = (
        f"{len(findings)} trainable parameters: {tiers[1]} in closed form, {tiers[2]} module by module, {tiers[3]} "
        f"objective by objective, {tiers[0]} without gradient. "
    )
    return "\n".join([*lines, summary + (f"{wrong} of them WRONG." if wrong else "All rows are right.")])
