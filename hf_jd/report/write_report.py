"""`hf-jd report`: turn a run's logs into pictures and one page, at any time of the run."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from hf_jd.report.history import read_history


def main(argv: Sequence[str]) -> int:
    """Run `hf-jd report`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="hf-jd report",
        description="Draw a run's losses, weights, conflicts and norms, as PNGs and one self-contained page. The run "
        "may still be running, or have been killed.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, help="The run's folder, its --output_dir.")
    parser.add_argument("--output_dir", type=Path, help="Where to save it (default: `report` in the run's folder).")
    arguments = parser.parse_args(argv)
    print(f"Open {report(arguments.run_dir, arguments.output_dir)} in a browser.")
    return 0


def report(run: Path, folder: Path | None = None) -> Path:
    """Write the pictures and the page.

    Args:
        run: The run's folder.
        folder: Where to save them; None: `report` in the run's folder.

    Returns:
        The page's path.

    Raises:
        ValueError: The run's folder has no logs, the target can't be written to, or matplotlib is missing.
    """
    history = read_history(run)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("hf-jd report needs matplotlib, which isn't installed: `pip install matplotlib`.")
    from hf_jd.report.figures import draw
    from hf_jd.report.page import page

    images = draw(history)
    files = {f"{name}.png": image for name, image in images.items()} | {"index.html": page(history, images).encode()}
    folder = run / "report" if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            part = folder / f"{name}.part"  # A reader sees the old file or the new one, never half a file.
            part.write_bytes(content)
            os.replace(part, folder / name)
    except OSError as error:
        raise ValueError(f"{folder} can't be written to: {error.strerror}.") from error
    return folder / "index.html"
