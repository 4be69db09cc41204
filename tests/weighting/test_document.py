"""docs/weightings.md is up to date with its generator."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from hf_jd.weighting import WEIGHTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator", ROOT / "scripts" / "build_weightings_doc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    text = (ROOT / "docs" / "weightings.md").read_text()
    assert text == generator.page(), "run python scripts/build_weightings_doc.py"


def test_the_page_has_every_method_and_its_pictures(generator: ModuleType) -> None:
    assert all(cls.guarantee and cls.cost for cls in WEIGHTINGS.values())
    text = generator.page()
    assert all(f"\n### {name}\n" in text for name in WEIGHTINGS)
    for picture in ("two", "three"):
        assert f"images/weightings/{picture}.png" in text
        assert (ROOT / "docs" / "images" / "weightings" / f"{picture}.png").stat().st_size < 150_000
