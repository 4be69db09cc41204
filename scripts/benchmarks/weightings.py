"""Time weightings against torchjd's and against quadprog called directly: `python scripts/benchmark.py weightings`.

Every entry is the median of interleaved runs, in milliseconds: each round runs all contestants once, so that a busy
machine slows all of them equally. The last table, which the documents show, has a column per kind of Gramian. `--json
FILE` saves the numbers; `--alone` leaves out the other libraries, which take minutes from m = 512 on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import quadprog  # ty: ignore[import-not-found]  # a compiled module without types
import torch
from torch import Tensor

from hf_jd.weighting import WEIGHTINGS, build_weighting
from hf_jd.weighting._solvers.batched import solve_nonnegative
from hf_jd.weighting._solvers.cosines import cosine_matrix
from hf_jd.weighting._solvers.projection import chosen_solvers, one_by_one, together

Contestant = Callable[[Tensor], object]


def gramian(kind: str, m: int, generator: torch.Generator) -> Tensor:
    """Draw a Gramian [m, m] of rows of 4 m numbers: `random`, with a common direction, or with a decaying spectrum.

    The rows of `low rank` have m / 2 numbers. The result is symmetric to the last bit, like the engine's.
    """
    width = m // 2 if kind == "low rank" else 4 * m
    rows = torch.randn(m, width, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        rows += 0.5 * torch.randn(4 * m, generator=generator, dtype=torch.float64)
    if kind == "weakly correlated":
        rows += 0.15 * torch.randn(4 * m, generator=generator, dtype=torch.float64)
    if kind == "decaying":
        rows *= torch.arange(1, 4 * m + 1) ** -0.7
    product = rows @ rows.T
    return (product + product.T) / 2


KINDS = ("random", "correlated", "weakly correlated", "decaying", "low rank")


def direct_quadprog(gramian: Tensor) -> np.ndarray:
    """Solve UPGrad's problems as stated, with one call of quadprog per problem."""
    matrix = gramian.numpy()
    identity = np.eye(len(matrix))
    zero = np.zeros(len(matrix))
    return sum(quadprog.solve_qp(matrix, zero, identity, row, 0)[0] for row in identity) / len(matrix)


def contestants(name: str, m: int, alone: bool = False) -> dict[str, Contestant]:
    """Return ours, and unless `alone`, torchjd's (if it has the method) and direct quadprog (for UPGrad)."""
    arguments = {"weights": [1.0] * m} if name == "constant" else {}
    runs: dict[str, Contestant] = {"hf_jd": build_weighting(name, **arguments)}
    if alone:
        return runs
    theirs = torchjd_weighting(name, m)
    if theirs is not None:
        runs["torchjd"] = theirs
    if name == "upgrad":
        runs["quadprog"] = direct_quadprog
    return runs


def torchjd_weighting(name: str, m: int) -> Contestant | None:
    """Build torchjd's weighting of the same method and parameters; None if it has none that reads a Gramian."""
    from torchjd import aggregation

    if importlib.util.find_spec("qpsolvers") is None:
        raise SystemExit("torchjd's projections need qpsolvers: pip install qpsolvers")
    arguments = {
        "upgrad": {},
        "dualproj": {},
        "mgda": {},
        "cagrad": {"c": 0.5},
        "aligned_mtl": {},
        "imtl_g": {},
        "fairgrad": {"alpha": 1.0},
        "pcgrad": {},
        "gradvac": {},
        "pcd": {},
        "krum": {"n_byzantine": 1},
        "random": {},
        "constant": {"weights": torch.ones(m, dtype=torch.float64)},
        "mean": {},
        "sum": {},
    }
    if name not in arguments:
        return None
    return getattr(aggregation, WEIGHTINGS[name].__name__)(**arguments[name])


def medians(runs: dict[str, Contestant], matrices: list[Tensor], seconds: float, rounds: int) -> dict[str, float]:
    """Run all contestants in turn, up to `rounds` times or for `seconds`; return their medians in milliseconds.

    A contestant that alone takes more than a fifth of the time is left out after its first two runs.
    """
    times: dict[str, list[float]] = {label: [] for label in runs}
    begin = time.perf_counter()
    for i in range(rounds + 1):
        for label, run in runs.items():
            if len(times[label]) > 1 and statistics.median(times[label]) > seconds / 5:
                continue
            start = time.perf_counter()
            run(matrices[i % len(matrices)])
            times[label].append(time.perf_counter() - start)
        if i and time.perf_counter() - begin > seconds:
            break
    # The first run warms up.
    return {label: 1e3 * statistics.median(values[1:] or values) for label, values in times.items()}


def measure_solvers(matrices: list[Tensor], kind: str, seconds: float, rounds: int) -> list[dict[str, object]]:
    """Time both solvers of the projection, for UPGrad's m problems and for DualProj's one."""
    m, rows = len(matrices[0]), []
    for problems, targets in ((m, torch.eye(m).double() / m), (1, torch.full((1, m), 1 / m).double())):
        runs: dict[str, Contestant] = {
            "one_by_one": partial(one_by_one, targets=targets),
            "together": partial(together, targets=targets),
        }
        times = medians(runs, matrices, seconds, rounds)
        chosen = "one_by_one" if chosen_solvers(matrices[0], targets)[0] is one_by_one else "together"
        rows.append({"Gramians": kind, "m": m, "problems": problems}
                    | {f"{label}, ms": value for label, value in times.items()}
                    | {"chosen": chosen, "chosen / best": times[chosen] / min(times.values())})  # fmt: skip
    return rows


def measure_warm_starts(matrices: list[Tensor], kind: str, seconds: float, rounds: int) -> list[dict[str, object]]:
    """Time the batched solver on UPGrad's problems, from a cold start and from the last step's solution."""
    m, times, overlaps = len(matrices[0]), [], []
    last = None
    for gramian in matrices:
        lengths = gramian.diagonal().sqrt()
        cosines = cosine_matrix(gramian, lengths)
        cosines.diagonal().add_(1e-6)  # an example may come twice
        solve = partial(solve_nonnegative, cosines, -cosines)
        solution = solve()
        if last is not None:
            starts: dict[str, Contestant] = {"cold": lambda _, s=solve: s(), "warm": lambda _, s=solve, z=last: s(z)}
            times.append(medians(starts, [gramian], seconds / len(matrices), rounds))
            overlaps.append(((solution > 0) == (last > 0)).double().mean().item())
        last = solution
    columns = {f"{label}, ms": statistics.median(t[label] for t in times) for label in ("cold", "warm")}
    return [{"Gramians": kind, "m": m} | columns | {"same support": statistics.median(overlaps)}]


def table(rows: list[dict[str, object]]) -> str:
    """Format the rows as a markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows)])


def by_kind(rows: list[dict[str, object]]) -> str:
    """Format the measurements as one markdown table per number of threads, with a column per kind of Gramian.

    A line is a size m or, if there are several weightings, a weighting. Brackets hold the ratio torchjd / hf_jd.
    """
    several = len({row["weighting"] for row in rows}) > 1
    tables: dict[object, dict[object, dict[str, object]]] = {}
    for row in rows:
        line, column = ("weighting", f"{row['Gramians']}, m = {row['m']}") if several else ("m", str(row["Gramians"]))
        ratio = row["torchjd / hf_jd"]
        entry = _cell(row["hf_jd, ms"]) + ("" if ratio is None else f" ({_cell(ratio)})")
        tables.setdefault(row["threads"], {}).setdefault(row[line], {line: row[line]})[column] = entry
    return "\n\n".join(f"threads: {n}\n\n{table(list(lines.values()))}" for n, lines in tables.items())


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def inputs_of(arguments: argparse.Namespace) -> list[tuple[str, list[Tensor]]]:
    """Return the Gramians to measure on: one size per entry, with the name of their kind."""
    if arguments.gramians is None:
        generator = torch.Generator().manual_seed(0)
        return [(k, [gramian(k, m, generator) for _ in range(5)]) for m in arguments.sizes for k in arguments.kinds]
    saved = torch.load(arguments.gramians)
    # The last batch of an epoch may be smaller.
    same = {kind: [g.double() for g in gramians if len(g) == len(gramians[0])] for kind, gramians in saved.items()}
    return [(kind.partition(", m = ")[0], matrices) for kind, matrices in same.items()]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weightings", nargs="+", default=["upgrad", "dualproj", "mgda"], help="names, or all")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 32, 64, 128, 256])
    parser.add_argument("--kinds", nargs="+", default=["random", "correlated", "low rank"], choices=KINDS)
    parser.add_argument("--gramians", type=Path, help="a file of `benchmark.py gramians` to use instead")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per line of the table")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true", help="only hf_jd's")
    parser.add_argument("--solvers", action="store_true", help="only the table that decides which solver to use")
    parser.add_argument("--warm-starts", action="store_true", help="only the gain from the last step's solution")
    arguments = parser.parse_args(argv)
    names = list(WEIGHTINGS) if arguments.weightings == ["all"] else arguments.weightings
    inputs = inputs_of(arguments)
    rows: list[dict[str, object]] = []
    measure = measure_solvers if arguments.solvers else measure_warm_starts
    if arguments.solvers or arguments.warm_starts:
        torch.set_num_threads(arguments.threads[0])
        print(table([r for k, g in inputs for r in measure(g, k, arguments.seconds, arguments.rounds)]))
        return 0
    for name in names:
        for kind, matrices in inputs:
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                m = len(matrices[0])
                runs = contestants(name, m, arguments.alone)
                if arguments.gramians or kind == "low rank":
                    runs.pop("quadprog", None)  # it takes no singular matrix
                if getattr(runs["hf_jd"], "reads", "gramian") == "losses":
                    continue
                times = medians(runs, matrices, arguments.seconds, arguments.rounds)
                ratio = times["torchjd"] / times["hf_jd"] if "torchjd" in times else None
                rows.append({"weighting": name, "Gramians": kind, "m": m, "threads": threads}
                            | {f"{label}, ms": times.get(label) for label in ("hf_jd", "torchjd", "quadprog")}
                            | {"torchjd / hf_jd": ratio})  # fmt: skip
                print(table(rows[-1:]).splitlines()[-1] if len(rows) > 1 else table(rows), flush=True)
    print(f"\n{by_kind(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0
