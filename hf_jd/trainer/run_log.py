"""`jd_log.jsonl`: what a run tells of itself while it runs, a line for each log, for `hf-jd report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOG_FILE = "jd_log.jsonl"


class RunLog:
    """The file, and the groups' cosines between two lines of it.

    A line is what Trainer logged, with `max_steps`, and `pairs`, the mean cosines of the groups' rows since the last
    line. The first line of a run has `begins`, which is "anew" or "resumed". Nothing is ever taken out of the file: a
    reader leaves out what stands above a new run, and, above a resumed one, the steps that it makes again.
    """

    def __init__(self):
        self._begins: str | None = "anew"
        self._names: list[str] = []
        self._sums = self._counts = torch.zeros(0, 0, dtype=torch.float64)

    def begin(self, resumed: bool) -> None:
        """Marks the next line as the first of a run."""
        self._begins = "resumed" if resumed else "anew"

    def add(self, gramian: Tensor, groups: Tensor, names: Mapping[int, str]) -> None:
        """Takes in a step: the cosines of the rows (S J)_k of the groups, of S [K, m] their members.

        Args:
            gramian: [m, m].
            groups: [m] the id of each objective's group.
            names: Of the groups that are present, by id.
        """
        if len(names) < 2:
            return
        members = torch.stack([groups == k for k in names]).to(gramian).double()
        joint = members @ gramian.double() @ members.T
        norms = joint.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
        where = self._positions(list(names.values()), gramian.device)
        self._sums[where[:, None], where] += joint / norms.outer(norms)
        self._counts[where[:, None], where] += 1

    def _positions(self, names: list[str], device: torch.device) -> Tensor:
        new = [name for name in names if name not in self._names]
        if new:
            self._names += new
            grown = [torch.zeros(len(self._names), len(self._names), dtype=torch.float64) for _ in range(2)]
            for total, part in zip(grown, (self._sums, self._counts), strict=True):
                total[: len(part), : len(part)] = part
            self._sums, self._counts = (total.to(device) for total in grown)
        return torch.tensor([self._names.index(name) for name in names], device=device)

    def write(self, folder: Path, entry: Mapping[str, Any]) -> None:
        """Adds a line; a line that a kill has cut off is left alone."""
        line = {**entry, **({"begins": self._begins} if self._begins else {}), **self._take()}
        self._begins = None
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILE).open("ab+") as file:
            if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")

    def _take(self) -> dict[str, Any]:
        """The mean cosines above the diagonal, row by row; None for pairs that weren't in a step together."""
        if not self._counts.any():
            return {}
        i, j = torch.triu_indices(len(self._names), len(self._names), offset=1, device=self._sums.device)
        means = (self._sums / self._counts)[i, j].tolist()
        self._sums, self._counts = torch.zeros_like(self._sums), torch.zeros_like(self._counts)
        cosines = [None if value != value else round(value, 4) for value in means]
        return {"pairs": {"names": self._names, "cosines": cosines}}
