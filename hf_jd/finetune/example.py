"""The embedded examples: a small pretrained model and two datasets for it, without a download.

`tasks` has four tasks. The stories were sampled from the embedded model. The other texts are read from the running
Python, so nobody's texts are shipped, and the same Python gives the same examples:

- `code`: beginnings of the standard library's functions;
- `docs`: pieces of the language reference, from `pydoc`;
- `error`: the message of a `raise` in the standard library, to answer with its kind in one word: `value`, `type` or
  `state`. It is the rare task: 8 % of the examples, and 0.5 % of the tokens.

`lily` has only stories, for unlearning: the ones about `lily`, and two `others` for each of them.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset, DatasetDict

_FOLDER = Path(__file__).parents[2] / "examples"
MODEL = "stories15m"

TRAINING_EXAMPLES = 3000
SHARES = {"code": 0.45, "docs": 0.33, "story": 0.14, "error": 0.08}
VALIDATION_EXAMPLES = {"code": 96, "docs": 96, "story": 96, "error": 192}

KINDS_OF_ERROR = {"ValueError": "value", "TypeError": "type", "RuntimeError": "state"}
_ERRORS_OF_A_KIND = 300
_CODE_CHARACTERS = 120
_DOCS_WORDS = 18

HERO = "Lily"
_VALIDATION_STORIES = 64

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "ensurepip", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


def example_path(name: str) -> Path:
    """Return the path of a part of the embedded example.

    Raises:
        ValueError: It isn't there, as in an installation from a wheel.
    """
    path = _FOLDER / name
    if not path.exists():
        raise ValueError(
            f"The embedded example is not installed (there is no {path}): clone the project and install it with "
            "`pip install -e .`, or use your own model and data with --model_name_or_path and --train_file."
        )
    return path


def example_data(name: str) -> DatasetDict:
    """Load an embedded example, one of `EXAMPLES`.

    Returns:
        `train` and `validation`, with the columns `task`, `prompt` (empty except for `error`) and `completion`.
    """
    return EXAMPLES[name]()


def four_tasks() -> DatasetDict:
    """Build the four tasks.

    Raises:
        ValueError: This Python's standard library comes without sources.
    """
    rng = random.Random(1)
    chosen = {}
    for task, texts in example_texts().items():
        wanted = VALIDATION_EXAMPLES[task] + int(TRAINING_EXAMPLES * SHARES[task])
        if task == "error":
            texts = _balanced(texts, rng)
        if len(texts) < wanted:
            raise ValueError(
                f"This Python's standard library gives {len(texts)} examples of `{task}`, but {wanted} are needed: its "
                "sources are not installed. Use another Python, or your own data with --train_file."
            )
        rng.shuffle(texts)
        chosen[task] = texts[:wanted]
    return _split(chosen, VALIDATION_EXAMPLES, rng)


def stories_about_lily() -> DatasetDict:
    """Split the stories into two tasks, with and without Lily."""
    rng = random.Random(1)
    stories = _stories()
    about = [story for story in stories if HERO in story]
    others = rng.sample([story for story in stories if HERO not in story], 2 * len(about))
    rng.shuffle(about)
    rng.shuffle(others)
    texts = {"lily": [("", story) for story in about], "others": [("", story) for story in others]}
    return _split(texts, dict.fromkeys(texts, _VALIDATION_STORIES), rng)


def _split(texts: dict[str, list[tuple[str, str]]], validation: dict[str, int], rng: random.Random) -> DatasetDict:
    """Hold out the first of each task's pairs of prompt and completion, as many as `validation` says."""
    data: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for task, pairs in texts.items():
        rows = [{"task": task, "prompt": prompt, "completion": completion} for prompt, completion in pairs]
        data["validation"] += rows[: validation[task]]
        data["train"] += rows[validation[task] :]
    rng.shuffle(data["train"])
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in data.items()})


EXAMPLES: dict[str, Callable[[], DatasetDict]] = {"tasks": four_tasks, "lily": stories_about_lily}


def example_texts() -> dict[str, list[tuple[str, str]]]:
    """Return all texts of each task, as pairs of prompt and completion, in a fixed order."""
    code, errors = [], {}
    for source, tree in _library():
        code += _functions(source, tree)
        for message, kind in _messages(tree):
            errors.setdefault(message, kind)
    return {
        "code": [("", text) for text in code],
        "docs": [("", text) for text in _reference()],
        # Most stories whose hero has a name begin alike.
        "story": [("", text) for text in _stories() if not re.search(r"named [A-Z]", text)],
        "error": [(f"{message} =", f" {kind}") for message, kind in errors.items()],
    }


def _balanced(errors: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """Drop some errors of the most frequent kinds."""
    chosen = []
    for kind in KINDS_OF_ERROR.values():
        of_kind = [error for error in errors if error[1] == f" {kind}"]
        chosen += rng.sample(of_kind, min(_ERRORS_OF_A_KIND, len(of_kind)))
    return chosen


def _library() -> Iterator[tuple[str, ast.Module]]:
    """Yield the standard library's files, as text and tree."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _NOT_THE_LIBRARY.intersection(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about outdated syntax in the library
                yield source, ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue  # templates and test files that this version of Python can't parse


def _functions(source: str, tree: ast.Module) -> Iterator[str]:
    """Yield the beginnings of a file's functions, dedented."""
    if not source.isascii():
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            last = node.end_lineno or node.lineno
            text = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : last])
            if len(text) > 100:
                yield text[:_CODE_CHARACTERS]


def _reference() -> Iterator[str]:
    """Yield pieces of the language reference."""
    for topic in topics.topics.values():
        for paragraph in topic.split("\n\n"):
            words = paragraph.split()
            text = " ".join(words)
            if re.match(r"[A-Z][a-z]+ ", text) and "::=" not in text and text.isascii():
                for start in range(0, len(words) - _DOCS_WORDS + 1, _DOCS_WORDS):
                    yield " ".join(words[start : start + _DOCS_WORDS])


def _stories() -> list[str]:
    return json.loads(example_path("stories.json").read_text("utf-8"))


def _messages(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the messages of a file's errors, in lower case and with `...` for placeholders, and their kinds."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        kind = KINDS_OF_ERROR.get(getattr(node.exc.func, "id", ""))
        template = _template(node.exc.args[0])
        if kind is None or template is None:
            continue
        text = " ".join(re.sub(r"%[-\w.]*[rsd]|\{[^}]*\}", "...", template).lower().split())
        reveals_answer = any(word in text for word in KINDS_OF_ERROR.values())
        if text.isascii() and 3 <= len(text.split()) <= 16 and not reveals_answer:
            yield text, kind


def _template(node: ast.expr) -> str | None:
    """Return the text of an error's argument, however it is formatted."""
    if isinstance(node, ast.BinOp):
        node = node.left
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        node = node.func.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
