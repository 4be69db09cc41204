"""A study's plan, a YAML file -> its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Plan:
    """What is compared, and by what.

    Attributes:
        study: The module of `studies` that trains.
        measure: What methods are compared by.
        better: `higher` or `lower`, of that measure.
        shown: All measures of the table, by their names in it, each with its format.
        control: The configuration that the others are compared with, on the same seeds.
        base: The flags that all runs share.
        configurations: Each method's flags, by its name.
        variants: Flags that each configuration is run with, by name.
        sweep: The configurations of which the best is a control, too: a weight or another number chosen by hand.
        at: A loss, by the name of a task: the table has the other task's loss when this one reaches it.
        axes: Two tasks, whose losses the picture follows; without them it shows `measure`.
        front: Two measures: the picture shows each method as a point, and the sweep as a line.
        seeds: The number of runs per configuration and variant.
    """

    study: str
    measure: str
    better: str
    shown: dict[str, str]
    control: str
    base: dict[str, Any]
    configurations: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    sweep: list[str] = field(default_factory=list)
    at: dict[str, float] = field(default_factory=dict)
    axes: list[str] = field(default_factory=list)
    front: list[str] = field(default_factory=list)
    seeds: int = 5

    @classmethod
    def read(cls, path: Path, seeds: int | None = None, max_steps: int | None = None) -> Plan:
        """Read a plan; arguments that are given take the place of the plan's.

        Raises:
            ValueError: A part is missing or unknown, or names a configuration that isn't there.
        """
        parts: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        if seeds:
            parts["seeds"] = seeds
        try:
            plan = cls(**parts)
        except TypeError as error:
            raise ValueError(f"{path} is no plan of a study: {error}.") from error
        unknown = {plan.control, *plan.sweep} - set(plan.configurations)
        if unknown:
            raise ValueError(f"{path} names {', '.join(sorted(unknown))}, which is no configuration.")
        if plan.better not in ("higher", "lower"):
            raise ValueError(f"{path}: `better` is {plan.better}; give higher or lower.")
        if max_steps:
            plan.base["max_steps"] = max_steps
        return plan

    def runs(self) -> list[dict[str, Any]]:
        """All runs, one seed after the other."""
        return [
            {"variant": variant, "configuration": name, "seed": seed, "updates": self.base["max_steps"]}
            for seed in range(self.seeds)
            for variant in self.variants
            for name in self.configurations
        ]

    def flags(self, run: dict[str, Any]) -> dict[str, Any]:
        """All flags of a run."""
        return {**self.base, **self.variants[run["variant"]], **self.configurations[run["configuration"]]}
