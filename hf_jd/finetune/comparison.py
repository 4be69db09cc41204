"""A plan of a comparison, as a YAML file -> its runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_jd.finetune.parser import read_settings

_TWIN = {"stock": False, "jd_weighting": "mean", "jd_objectives": "instance"}


@dataclass(frozen=True)
class Tradeoff:
    """A trade-off between two tasks.

    Attributes:
        forget: The task whose loss should rise.
        keep: The task whose loss should not rise.
        until: The loss of `forget` at which everything is forgotten.
    """

    forget: str
    keep: str
    until: float


@dataclass(frozen=True)
class Plan:
    """The runs to compare.

    Attributes:
        base: The flags that all configurations share.
        configurations: The further flags of each configuration, by name.
        variants: Further flags, by name: each configuration is run with each variant.
        tradeoff: The trade-off that table and picture show; None shows every task separately.
    """

    base: dict[str, Any]
    configurations: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    tradeoff: Tradeoff | None

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            ValueError: The file can't be read, or is no plan.
        """
        parts = {"base": None, "configurations": None, "variants": None, "tradeoff": None, **read_settings(path)}
        try:
            plan = cls._of(**parts)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no plan of a comparison: it needs `configurations`, each a name with its flags, and may "
                "have `base`, the flags that they share; `variants`, each a name with flags to run every configuration "
                "with; and `tradeoff`, with `forget` and `keep`, each a task, and `until`, the loss of the first at "
                f"which everything is forgotten. ({error})"
            ) from error
        if len({_file_name(name) for name in plan.all()}) < len(plan.all()):
            raise ValueError(f"{path}: two of {', '.join(plan.all())} would be saved in one folder; rename one.")
        return plan

    @classmethod
    def _of(cls, base: Any, configurations: Any, variants: Any, tradeoff: Any) -> Plan:
        configurations, variants = (
            {str(name): _flags(name, flags) for name, flags in part.items()}
            for part in (configurations, variants or {"": {}})
        )
        if not configurations:
            raise ValueError("There are no configurations.")
        if tradeoff is not None:
            tradeoff = Tradeoff(str(tradeoff["forget"]), str(tradeoff["keep"]), float(tradeoff["until"]))
        return cls(dict(base or {}), configurations, variants, tradeoff)

    def names(self, variant: str) -> dict[str, str]:
        """Map each configuration to the name of its runs with a variant."""
        return {name: f"{name}, {variant}" if variant else name for name in self.configurations}

    def all(self) -> dict[str, dict[str, Any]]:
        """Merge the flags of each configuration with those of each variant, by name."""
        return {
            full: {**self.configurations[name], **flags}
            for variant, flags in self.variants.items()
            for name, full in self.names(variant).items()
        }

    def stock(self) -> str | None:
        """Return the name of the first configuration that runs transformers' Trainer."""
        return next((name for name, flags in self.all().items() if flags.get("stock")), None)

    def runs(self, folder: Path, seeds: int) -> list[Run]:
        """List all runs, seed by seed.

        Args:
            folder: Where to save them.
            seeds: The number of runs per configuration.

        Raises:
            ValueError: That number isn't positive.
        """
        if seeds < 1:
            raise ValueError(f"--seeds is {seeds}; give at least 1.")
        shared = {"eval_on_start": True, **self.base, "logging_steps": 1, "time_steps": True, "disable_tqdm": True}
        kinds = [(name, False, flags) for name, flags in self.all().items()]
        kinds += [(name, True, {**flags, **_TWIN}) for name, _, flags in kinds if flags.get("stock")]
        runs = []
        for seed in range(seeds):
            for name, twin, flags in kinds:
                place = folder / "runs" / f"{_file_name(name)}{'-twin' * twin}-{seed}"
                runs.append(Run(name, twin, {**shared, **flags, "seed": seed, "output_dir": str(place)}))
        return runs


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        configuration: The name of its configuration.
        twin: Whether it only measures what a stock run can't measure.
        settings: All its flags, by name.
    """

    configuration: str
    twin: bool
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The name to print."""
        return f"{self.configuration}{' (twin)' * self.twin}, seed {self.settings['seed']}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.settings["output_dir"])


def _flags(name: Any, flags: Any) -> dict[str, Any]:
    if not isinstance(flags, dict | None):
        raise ValueError(f"`{name}` has `{flags}` instead of flags as `name: value`.")
    return dict(flags or {})


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
