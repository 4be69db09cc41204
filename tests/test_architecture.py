"""House rules: which parts of the package may import which, and how long files and functions may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 50

HUGGING_FACE = {"transformers", "datasets", "accelerate", "peft", "trl", "huggingface_hub"}
ISLANDS = {"gramian", "weighting", "losses", "metrics"}

# What each part (room) of hf_jd must not import: other packages, and other parts of hf_jd.
FORBIDDEN_PACKAGES = {
    "gramian": HUGGING_FACE,
    "weighting": HUGGING_FACE,
    "metrics": HUGGING_FACE,
    "report": HUGGING_FACE | {"torch"},
}
FORBIDDEN_ROOMS = {island: {"*"} - {island} for island in ISLANDS} | {
    "trainer": {"finetune", "cli"},
    "arguments": {"trainer", "finetune", "cli", "gramian", "losses", "metrics"},
    "distributed": {"trainer", "arguments", "finetune", "cli", "weighting", "losses"},
    "objectives": {"trainer", "arguments", "finetune", "cli", "gramian", "weighting"},
    "contradictions": {"trainer", "finetune", "cli", "gramian", "losses", "metrics"},
    "sampler": {"*"},
    "report": {"*"},
    "estimate": {"trainer", "arguments", "distributed", "gramian", "weighting", "losses", "metrics", "objectives"},
    "packing": {"*"},
    "groups": {"*"},
    "batches": {"trainer", "arguments", "finetune", "cli", "gramian", "weighting", "losses", "metrics"},
    "collator": {"trainer", "arguments", "finetune", "cli", "gramian", "weighting"},
}
# Folders within a room, each of which may import only those after it, and files of the room itself.
FLOORS = {"gramian": ["_passes", "_rules"], "trainer": ["trl", "run", "backends", "step", "splitting"]}
# The formulas use plain numbers: only code that reads a configuration may import model libraries.
FORMULAS = {"cases", "hardware", "memory", "operations", "timing", "traffic"}
# Only tests and benchmarks may import these.
REFERENCES = {"torchjd", "cvxpy", "pytest", "hypothesis"}


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """Return the part of hf_jd that a module belongs to; None for a module of another package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "hf_jd" and len(parts) > 1 else None


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("hf_jd"), ids=named)
def test_imports_go_one_way(path):
    own_room = path.relative_to(ROOT / "hf_jd").parts[0].removesuffix(".py")
    imported = set(imports(path))
    packages = {module.partition(".")[0] for module in imported}
    assert not packages & (FORBIDDEN_PACKAGES.get(own_room, set()) | REFERENCES)
    rooms = {other for module in imported if (other := room(module)) is not None} - {own_room}
    forbidden = FORBIDDEN_ROOMS.get(own_room, set())
    assert not (rooms if "*" in forbidden else rooms & forbidden)


@pytest.mark.parametrize("path", files("hf_jd"), ids=named)
def test_folders_within_a_room_import_downwards(path):
    own, *rest = path.relative_to(ROOT / "hf_jd").parts
    floors = FLOORS.get(own, [])
    if rest and rest[0] in floors:
        above = {f"hf_jd.{own}.{floor}" for floor in floors[: floors.index(rest[0])]}
        assert not {".".join(module.split(".")[:3]) for module in imports(path)} & above


@pytest.mark.parametrize("path", files("hf_jd"), ids=named)
def test_private_modules_are_imported_only_within_their_room(path):
    private = {module for module in imports(path) if module.startswith("hf_jd.") and "._" in module}
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert not {module for module in private if not package.startswith(module.partition("._")[0])}


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_cost_formulas_import_no_tensors(name):
    packages = {module.partition(".")[0] for module in imports(ROOT / "hf_jd" / "estimate" / f"{name}.py")}
    assert not packages & (HUGGING_FACE | {"torch"})


@pytest.mark.parametrize("path", files("scripts"), ids=named)
def test_scripts_import_only_the_package(path):
    assert not {"tests", "examples"} & {module.partition(".")[0] for module in imports(path)}


@pytest.mark.parametrize("path", files("hf_jd", "scripts", "tests"), ids=named)
def test_files_and_functions_are_short(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if path.is_relative_to(ROOT / "tests"):  # Functions that train cases have many documented flags.
                length -= len((ast.get_docstring(node) or "").splitlines())
            assert length <= LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


def test_the_embedded_example_is_not_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'packages = ["hf_jd"]' in text
    assert (ROOT / "examples" / "NOTICE.md").exists()
