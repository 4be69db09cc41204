"""Write docs/weightings.md and its pictures from `WEIGHTINGS`: `python scripts/build_weightings_doc.py`.

What the page says about a method comes from its class; the text below only compares methods. A test checks that the
page is up to date.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

import torch
from torch import Tensor

from hf_jd.weighting import WEIGHTINGS, Stateful, Weighting, build_weighting

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = "images/weightings"

INTRODUCTION = """\
# Weightings

*This page is written by `scripts/build_weightings_doc.py` from the list `WEIGHTINGS` and its classes; change those.*

A weighting turns the Gramian G = J Jᵀ [m, m] of a step's objectives into weights w [m]; the update is Jᵀ w. Choose one
with `--jd_weighting NAME`, or in Python:

```python
from hf_jd.weighting import UPGradWeighting, build_weighting

weights = UPGradWeighting()(gramian)  # [m], dtype and device of the Gramian
weighting = build_weighting("cagrad", c=0.4)
```

Any callable G → w is a weighting, such as your own function, or one of TorchJD's weightings. Below, gᵢ is row i of J, p
the preference vector (1/m each by default), and an update d *conflicts* with row i if ⟨gᵢ, d⟩ < 0.

## Which one, when

| You want | Use |
|---|---|
| no objective sacrificed, and the stock step without conflict | `upgrad` |
| the same, but as near to the mean as possible, at a fraction of the cost for many objectives | `dualproj` |
| a Pareto stationary point, however slowly: the shortest row decides | `mgda` |
| a compromise between the mean and the worst objective, set by one number | `cagrad`, `raco` |
| equal influence for objectives whose gradients differ by orders of magnitude | `nash_mtl`, `config`, `gapo` |
| one objective before all others, but with progress for the others, too | `pcd` |
| robustness to a few corrupt objectives | `krum` |
| less noise in the weights, with any of these | `cr_mogm` around it |
| a fair baseline | `mean` (the same losses, the same code), `random` |
| a baseline that needs no Gramian, at the cost of the stock step | any weighting below that reads losses |

Don't rely on `pcgrad`, `gradvac` or `aligned_mtl` for a guarantee: with three or more objectives, their updates may
conflict with rows, as the second picture shows for `pcgrad`. `imtl_g` may even go against all of them.
"""

PICTURE_TEXT = """\
## What they do, in pictures

Two rows (black) that conflict, the first three times as long as the second. Shaded: the dual cone, the directions that
conflict with neither. Red: a method's update (shortened where it would leave the picture). In its first step, `gradvac`
equals `pcgrad`.

![Updates of two conflicting rows]({pictures}/two.png)

Three rows in space: directions on a map (a central projection of the sphere). The shaded triangle is the dual cone; an
update that has crossed a side conflicts with that side's row. Lengths are not shown.

![Directions of the updates of three rows]({pictures}/three.png)
"""

DEPARTURES = """\
## Numerics

All problems are solved in float64, whatever the Gramian's dtype; if rows are far from dependent, the batched solver
computes corrections in float32, from residuals in float64. Rows are scaled to unit length before any decision, so every
tolerance is a cosine: multiplying all losses by 1e-8, or one row by 1e6, changes no decision, and there are no
`norm_eps` or `reg_eps` to set. If rows are dependent, many weights give the same update; the ones of minimum norm (each
measured in lengths of its row) are returned, so the weights are a function of G, and follow a permutation of the
objectives. Duplicates of an example in a batch share its weight.

A Gramian in float32 or bfloat16 has rounding errors, which show as negative eigenvalues. If one is below -1e-10, in
units of the rows' lengths, twice its size is added to the diagonal (`imtl_g` and `aligned_mtl` drop eigenvalues of that
size instead). The result is as close to the true Gramian as G. Then the weights are unique, change continuously with G,
and don't amplify the errors: they stay below the root of one over the errors' size, while exact solutions may weigh
rows by 1e9. A row's conflict with the update is no larger than the errors. A matrix with eigenvalues too low for
rounding errors (below -m/64, in the same units) is refused, with its eigenvalues in the error.

Every projection is verified by its optimality conditions, to 1e-10, as a cosine with the projection. If it fails,
another solver takes over. Rows that are opposite up to 1e-7 of their length are nearly beyond the resolution of a
float64 Gramian; there, the best solution is accepted up to 1e-6, and beyond that the solution with 2e-10 more on the
diagonal, which meets those 1e-6.

quadprog solves a few problems one by one on the CPU; a batched active-set method solves many of them together on the
device of G. `python scripts/benchmark.py weightings --solvers` measures the table behind this choice. If rows are
dependent, or nearly so, active sets wander. So many problems (of more than 56 rows) are then solved by operator
splitting (Douglas and Rachford's method): it finds which objectives' weights are raised. These sets have most rows in
common, so one factorisation of G serves all problems, and each adds a small system in the rows by which its set
differs. The solution shows which rows are wrong, a few exchanges correct them, and the optimality conditions verify the
result. If the dual cone is {0}, the problems have an easier mirror image in the null space of G; a sample of the
problems shows which of the two to solve. Problems that remain unsolved go to quadprog. For more than 64 dependent rows,
Newton's method on the dual finds the weights of minimum norm. For m > 32 on a device other than the CPU, G stays there
unless rows are dependent, and the host reads only scalars (a test counts these reads on the CPU). `mgda`, `cagrad`,
`raco`, `gapo` and `pcd` copy G to the CPU once.

## What they cost

The table has UPGrad's time in milliseconds on one thread of a small shared machine, and in brackets, how many times
faster it is than TorchJD 0.18's. In the column *low rank*, rows have m / 2 numbers, so half of the rows depend on the
others; there, TorchJD solves a different problem, with 1e-4 more on the diagonal. The last column's Gramians are from
LoRA fine-tuning of the embedded example, with one objective per example: a third of the pairs or more conflict, and
large batches hold an example twice.

| m | random rows | with a common direction | low rank | fine-tuning |
|---|---|---|---|---|
| 8 | 0.44 (0.9) | 0.35 (1.2) | 1.1 (0.4) | 0.43 (1.0) |
| 32 | 2.3 (1.4) | 0.68 (6) | 5.0 (0.6) | 1.4 (2.9) |
| 64 | 4.9 (5) | 1.7 (24) | 24 (1.8) | 6.4 (7) |
| 128 | 13 (35) | 0.84 (850) | 58 (11) | 20 (34) |
| 256 | 55 (160) | 2.4 (4900) | 240 (26) | 100 (110) |

    python scripts/benchmark.py weightings --weightings upgrad --threads 1
    python scripts/benchmark.py gramians gramians.pt
    python scripts/benchmark.py weightings --weightings upgrad --threads 1 --gramians gramians.pt

All weightings that read a Gramian, in milliseconds:

| weighting | random, m = 8 | low rank, m = 8 | random, m = 256 | low rank, m = 256 |
|---|---|---|---|---|
| `upgrad` | 0.31 | 0.92 | 42 | 160 |
| `dualproj` | 0.14 | 0.66 | 3.1 | 16 |
| `mgda` | 0.23 | 1.2 | 4.8 | 61 |
| `gapo` | 0.29 | 1.2 | 4.8 | 52 |
| `cagrad` | 0.46 | 0.82 | 5.4 | 12 |
| `raco` | 0.73 | 1.7 | 7.7 | 12 |
| `aligned_mtl` | 0.1 | 0.099 | 5.8 | 4.3 |
| `imtl_g` | 0.13 | 0.16 | 1.1 | 7 |
| `config` | 0.43 | 0.28 | 2 | 8.3 |
| `nash_mtl` | 2.2 | 1.4 | 9.8 | 12 |
| `fairgrad` | 0.78 | 0.86 | 7.7 | 12 |
| `pcgrad` | 0.46 | 0.46 | 47 | 46 |
| `gradvac` | 0.96 | 0.98 | 88 | 96 |
| `pcd` | 0.52 | 0.75 | 28 | 20 |
| `cr_mogm` | 0.57 | 1.2 | 47 | 150 |
| `modo` | 0.17 | 0.17 | 0.71 | 1.1 |
| `sdmgrad` | 1.5 | 1.9 | 3.1 | 3.2 |
| `krum` | 0.14 | 0.12 | 1.8 | 1.7 |
| `random` | 0.053 | 0.055 | 0.32 | 0.33 |
| `constant` | 0.058 | 0.056 | 0.36 | 0.33 |
| `mean` | 0.047 | 0.032 | 0.22 | 0.28 |
| `sum` | 0.03 | 0.029 | 0.29 | 0.28 |

    python scripts/benchmark.py weightings --weightings all --alone --threads 1 --sizes 8 256 --kinds random "low rank"

Larger Gramians take UPGrad 0.24 s (random, m = 512), 1.0 s (low rank, m = 512), 1.9 s and 10 s (m = 1,024):

    python scripts/benchmark.py weightings --alone --threads 1 --sizes 512 1024 --kinds random "low rank"

At m = 8, six weightings are slower than TorchJD's: `mean`, `sum`, `constant` and `random` take 0.03 to 0.06 ms instead
of 0.005, since every Gramian is checked, even for a weighting that ignores its values; `imtl_g` is slower by 0.05 ms,
and `krum` by 0.02. Both are faster at 256.

If other processes keep the cores busy, set `OMP_NUM_THREADS=1`: the threads of BLAS (NumPy has its own) otherwise wait
for each other at every small system, which may cost far more than the work itself.

The solvers do not start from the last step's solution. Even in the best case, the same examples in every step, 15 % of
the signs change from one step to the next, and the gain can't be told from noise: at m = 128, 9.9 ms against 9.8 in one
run, 10.3 against 12.2 in another, and at m = 64, a loss in both runs (`benchmark.py gramians FILE --fixed`, then
`weightings --warm-starts --gramians FILE`).

## Where TorchJD 0.18 gives other results

Each difference has a test in `tests/weighting/test_torchjd.py`. All other results agree.

- **UPGrad, DualProj**: TorchJD divides G by its trace and adds 1e-4 to the diagonal, so updates may conflict with short
  rows; a Gramian of trace below 1e-4 counts as zero, and the mean is returned, conflicting or not. Here the projection
  is exact at any scale.
- **MGDA**: TorchJD stops after 100 steps of the Frank-Wolfe method. Here the update is exactly the shortest vector, so
  there is no `epsilon` or `max_iters` to set.
- **CAGrad**: TorchJD's `norm_eps` makes it treat small Gramians as zero, and short mixtures as Pareto stationary. Here,
  the problem is solved exactly. A zero row, which no update can serve, is left out instead of stopping the step.
- **Krum**: the paper's score sums *squared* distances; TorchJD's sums distances.
- **IMTL-G**: TorchJD compares the sum of v, which has a unit, with 1e-12, and gives zero weights to long rows.
- **Nash-MTL**: TorchJD solves for G divided by its Frobenius norm, approximately, and does not scale back, so that
  before `max_norm` its updates are longer than the paper's by the root of that norm. Here G w = 1/w is solved exactly;
  there is no `n_tasks` or `optim_niter` to set, and objectives may come and go.
- **GradVac, PCD**: there is no epsilon. PCD takes its primary objective by name, and both keep moving averages by name.
- **PCGrad, GradVac, Random**: the random orders and weights come from a separate, seeded generator.
- **DWA**: a window of steps replaces the paper's epoch.
- **Uncertainty**: the log-variances are learnt by the weighting itself, by implicit gradient descent, since the model's
  optimizer does not know them.

## What is not here

These methods need more than G, or more than the losses at one point:

- **GradDrop, TrimmedMean** decide for each parameter separately, from the signs or the order of its m gradients, so
  there are no weights.
- **GradNorm** takes gradients at a chosen layer and learns its weights by differentiating those gradients' norms.
- **ExcessMTL** divides gradients by the root of their squares' sums, kept for every parameter and every objective: m n
  numbers, which G doesn't have.

Other methods are here in a form that needs only one batch:

- **FAMO** compares losses before and after a step on the same batch, which takes a second forward; `famo` compares one
  step's losses with the next step's.
- **MoDo, SDMGrad** multiply Jacobians of two independent batches, J_1 J_2^T; `modo` and `sdmgrad` use J J^T of one
  batch, whose diagonal is larger by the noise: rows with little noise get more weight than in the papers.
- **RACO** clips CAGrad's mixture to the preferences. Scaling the correction back to CAGrad's radius afterwards is our
  reading of the paper. RACO's heuristics for training are left out, as is GAPO's variant with preferences. """


def page() -> str:
    """Return the text of docs/weightings.md."""
    parts = [
        INTRODUCTION,
        PICTURE_TEXT.format(pictures=PICTURES),
        "## All of them\n",
        _table(),
        "",
        "## Each of them\n",
    ]
    parts += [_section(name, cls) for name, cls in WEIGHTINGS.items()]
    return "\n".join([*parts, DEPARTURES])


def _table() -> str:
    lines = ["| name | reads | remembers | what it guarantees | cost | parameters |", "|---|---|---|---|---|---|"]
    for name, cls in WEIGHTINGS.items():
        reads = "another's" if name == "cr_mogm" else _build(name, 3).reads
        parameters = ", ".join(f"`{p}`" for p in inspect.signature(cls).parameters)
        remembers = "yes" if issubclass(cls, Stateful) else ""
        lines.append(f"| [`{name}`](#{name}) | {reads} | {remembers} | {cls.guarantee} | {cls.cost} | {parameters} |")
    return "\n".join(lines)


def _section(name: str, cls: type[Weighting]) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    body, _, references = text.partition("References:\n")
    body, _, attributes = body.partition("Attributes:\n")
    lines = [f"### {name}\n", f"`{cls.__name__}`. {_escaped(body.strip())}\n"]
    weights = inspect.cleandoc(cls.weigh.__doc__ or "").split("\n")[0]
    weights = re.sub("^(Compute|Return) ", "", weights[0].lower() + weights[1:], flags=re.IGNORECASE)
    lines.append(f"Weights: {_escaped(weights)}\n")
    documented = dict(_items(_inherited_attributes(cls)) + _items(attributes))
    for parameter in inspect.signature(cls).parameters.values():
        required = parameter.default is parameter.empty
        default = "required" if required else f"default `{parameter.default!r}`"
        lines.append(f"- `{parameter.name}` ({default}): {_escaped(documented[parameter.name])}")
    if inspect.signature(cls).parameters:
        lines.append("")
    if references:
        lines.append(f"*{' '.join(references.split())}*\n")
    return "\n".join(lines)


def _inherited_attributes(cls: type[Weighting]) -> str:
    docs = [inspect.cleandoc(base.__doc__ or "") for base in cls.__mro__[1:] if issubclass(base, Weighting)]
    return "\n".join(doc.partition("Attributes:\n")[2].partition("References:\n")[0] for doc in docs)


def _items(attributes: str) -> list[tuple[str, str]]:
    """Split an Attributes section, in reverse: if a name comes twice, a dict of the result keeps the first."""
    matches = re.findall(r"^ *(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.M)
    return [(name, " ".join(text.split())) for name, text in reversed(matches)]


def _escaped(text: str) -> str:
    """Escape markdown's special characters, except in indented lines, which are formulas."""
    lines = text.split("\n")
    return "\n".join(line if line.startswith("    ") else _escaped_line(line) for line in lines)


def _escaped_line(line: str) -> str:
    pieces = line.split("`")  # every second one is code
    return "`".join(piece if i % 2 else re.sub(r"([<*])", r"\\\1", piece) for i, piece in enumerate(pieces))


def _build(name: str, m: int) -> Weighting:
    return build_weighting(name, **({"weights": [1.0] * m} if name == "constant" else {}))


def _drawn(m: int) -> list[str]:
    """Return the methods to draw: those that read the Gramian, without others that have the same direction."""
    skipped = {"cr_mogm", "random", "constant", "sum", "gradvac", "modo", "sdmgrad"} | ({"krum"} if m < 4 else set())
    return [name for name in WEIGHTINGS if name not in skipped and _build(name, m).reads == "gramian"]


def draw_two(path: Path) -> None:
    """Draw each method's update of two conflicting rows, one panel per method."""
    from matplotlib import pyplot as plt

    rows = torch.tensor([[3.0, 0.6], [-0.62, 0.78]], dtype=torch.float64)
    names = _drawn(2)
    figure, axes = plt.subplots(4, 4, figsize=(10, 7.4), sharex=True, sharey=True)
    for axis in axes.flat:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        cone = torch.stack([_orthogonal(rows[0], rows[1]), _orthogonal(rows[1], rows[0])])
        corners = [[0.0, 0.0], *(9 * cone).tolist()]
        axis.fill(*zip(*corners, strict=True), color="#dce9f5", lw=0)
        for row in rows:
            _arrow(axis, row, "black")
        update = rows.T @ _build(name, 2)(rows @ rows.T)
        _arrow(axis, update * min(1.0, 3 / update.norm().item()), "#d62728")
        axis.set(xlim=(-1.3, 3.3), ylim=(-0.3, 2.6), aspect="equal", title=name)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _orthogonal(row: Tensor, other: Tensor) -> Tensor:
    """Return the unit vector orthogonal to the row, towards the other one: a side of the dual cone in the plane."""
    side = torch.stack([-row[1], row[0]]) / row.norm()
    return side if side @ other > 0 else -side


def _arrow(axis: object, vector: Tensor, color: str) -> None:
    x, y = vector.tolist()
    axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8})  # ty: ignore


def draw_three(path: Path) -> None:
    """Draw the directions of all methods' updates of three rows on one map (a central projection of the sphere)."""
    from matplotlib import pyplot as plt

    rows = torch.tensor([[-2.08, 1.93, -2.07], [2.89, 1.14, 0.43], [-0.21, -0.04, 0.54]], dtype=torch.float64)
    corners = torch.linalg.inv(rows).T
    corners /= corners.norm(dim=1, keepdim=True)
    centre = corners.sum(dim=0) / corners.sum(dim=0).norm()
    right = torch.linalg.cross(torch.tensor([0.0, 1, 0], dtype=torch.float64), centre)
    right /= right.norm()
    up = torch.linalg.cross(centre, right)

    def place(direction: Tensor) -> tuple[float, float]:
        scale = direction @ centre
        return (direction @ right / scale).item(), (direction @ up / scale).item()

    figure, axis = plt.subplots(figsize=(7, 6))
    axis.fill(*zip(*[place(c) for c in corners], strict=True), color="#dce9f5", lw=1, ec="#7aa6cf")
    middle = torch.tensor([place(c) for c in corners]).mean(dim=0)
    for i in range(3):
        side = torch.tensor([place(c) for j, c in enumerate(corners) if j != i]).mean(dim=0)
        outside = side + 0.13 * (side - middle) / (side - middle).norm()
        axis.annotate(f"against g{i + 1}", tuple(outside.tolist()), ha="center", va="center", color="#3b6ea5")
    axis.margins(0.3, 0.08)
    places = {name: place(rows.T @ _build(name, 3)(rows @ rows.T)) for name in _drawn(3)}
    height = float("inf")
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        height = min(y, height - 0.06)  # move down names that would overlap
        axis.plot(x, y, "o", color="#d62728", ms=6, mec="white", mew=0.5, zorder=3)
        axis.annotate(name, (x, y), (x + 0.3, height), va="center", arrowprops={"arrowstyle": "-", "lw": 0.5})
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    (DOCS / PICTURES).mkdir(parents=True, exist_ok=True)
    (DOCS / "weightings.md").write_text(page())
    draw_two(DOCS / PICTURES / "two.png")
    draw_three(DOCS / PICTURES / "three.png")


if __name__ == "__main__":
    main()
