"""Copy a comparison's table into a page, between the comments that name it, and its picture into docs/images.

So the numbers in the documents are those that a command printed:

    python scripts/update_page.py runs/demo docs/demo.md
    python scripts/update_page.py runs/unlearn docs/unlearning.md
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from hf_jd.finetune.compare import PICTURE, TABLE

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def update(comparison: Path, page: Path) -> None:
    """Write the table between `<!-- NAME ... -->` and `<!-- /NAME -->`, where NAME is the comparison's folder.

    Raises:
        ValueError: The page has no such comments, or the folder has no finished comparison.
    """
    name = comparison.resolve().name
    if not (comparison / TABLE).exists():
        raise ValueError(f"{comparison} holds no finished comparison: it has no {TABLE}.")
    table = (comparison / TABLE).read_text("utf-8")
    text = page.read_text("utf-8")
    between = re.compile(rf"(<!-- {re.escape(name)}\b[^\n]*-->\n)(.*?)(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"{page} has no place for the table: <!-- {name} --> and <!-- /{name} -->.")
    page.write_text(between.sub(lambda match: match[1] + table + match[3], text), "utf-8")
    shutil.copy(comparison / PICTURE, IMAGES / f"{name}.png")


if __name__ == "__main__":
    update(Path(sys.argv[1]), Path(sys.argv[2]))
