"""A study's plan, a YAML file -> its runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Plan:
    """The configurations of a study, and how they are compared.

    Attributes:
        study: The module of `studies` that trains.
        measure: The measure that decides.
        better: Whether `higher` or `lower` is better.
        shown: The table's measures and their formats, by name.
        control: The configuration to compare the others with, on the same seeds.
        base: The flags of all runs.
        configurations: Each method's flags, by name.
        variants: Further flags to run each configuration with, by name.
        sweep: Configurations with a number chosen by hand, such as a weight; the best one is another control.
        at: A value of a task's loss, by name: the table has the other task's loss at that point.
        axes: Two tasks whose losses the picture shows; without them, it shows `measure`.
        front: Two measures: the picture shows methods as points, and the sweep as a line.
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
        """Read a plan; arguments override the plan's numbers.

        Raises:
            ValueError: A part is missing or unknown, or names an unknown configuration.
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
        """List all runs, seed by seed."""
        return [
            {"variant": variant, "configuration": name, "seed": seed, "updates": self.base["max_steps"]}
            for seed in range(self.seeds)
            for variant in self.variants
            for name in self.configurations
        ]

    def flags(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return all flags of a run."""
        return {**self.base, **self.variants[run["variant"]], **self.configurations[run["configuration"]]}
