"""House rules of the engine: no circular imports, not even for type hints; types instead of parsed strings."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import hf_jd.gramian
from hf_jd.gramian import Engine
from hf_jd.gramian._passes.passes import Measurement

HOME = Path(hf_jd.gramian.__file__).parent
FILES = sorted(path for path in HOME.rglob("*.py") if path != HOME / "__init__.py")
PARAMETERS = 5  # of a function, besides self
API = {"engine.Engine.__init__", "engine.Engine.compute_jacobian"}


def imported(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {
        (node.module or "").removeprefix("hf_jd.gramian.") for node in nodes if "hf_jd.gramian." in str(node.module)
    }


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")


def test_imports_are_not_circular():
    remaining = {dotted(path): imported(path) for path in FILES}
    while ready := [name for name, needs in remaining.items() if not needs & remaining.keys()]:
        for name in ready:
            del remaining[name]
    assert not remaining


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_functions_take_few_parameters_and_parse_no_strings(path: Path):
    tree = ast.parse(path.read_text("utf-8"))
    owners = {id(item): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            name = ".".join(filter(None, (path.stem, owners.get(id(node)), node.name)))
            arguments = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "ctx")]
            assert len(arguments) <= PARAMETERS or name in API, f"{name} takes {len(arguments)}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            kinds = ast.walk(node.args[1])
            assert not any(getattr(kind, "id", "") == "str" for kind in kinds), f"line {node.lineno}"


def test_losses_pass_through_few_functions():
    """Count the functions that losses pass in a first step, the longest path; resuming a generator counts again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    engine, losses = Engine(model), model(torch.randn(3, 4)).square().sum(1)
    stops: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call" and "gramian" in Path(code.co_filename).parts:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            given = {name: frame.f_locals.get(name) for name in names}
            carried = {"losses", "vector", "scalar"} & {n for n, value in given.items() if isinstance(value, Tensor)}
            if carried or any(value is losses or isinstance(value, Measurement) for value in given.values()):
                stops.append(code.co_filename)

    sys.setprofile(note)
    engine.compute_gramian(losses)
    sys.setprofile(None)
    files = [file for file, before in zip(stops, [None, *stops], strict=False) if file != before]
    assert len(stops) <= 25
    assert len(files) - len(set(files)) <= 10
