"""The page in a browser, if one is installed: it loads without console messages, and its contents are visible."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from hf_jd.report.write_report import report
from tests.report.runs import FORTY, write_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to open the page with")


def open_in_browser(page: Path, folder: Path, *flags: str) -> tuple[list[str], bytes]:
    """Return the console's messages, and a screenshot of the page's first 1100 x 2600 pixels."""
    assert BROWSER is not None
    picture, profile = folder / "page.png", folder / "profile"
    command = [BROWSER, *FLAGS, *flags, f"--user-data-dir={profile}", "--window-size=1100,2600"]
    command += [f"--screenshot={picture}", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], picture.read_bytes()


def brightness(picture: bytes) -> float:
    return float(imread(io.BytesIO(picture))[:, :, :3].mean())


@pytest.mark.parametrize("groups", [["code", "docs", "error", "story"], FORTY], ids=["four", "forty"])
def test_the_page_by_day_and_by_night(groups, tmp_path):
    page = report(write_run(tmp_path / "run", groups))
    said, day = open_in_browser(page, tmp_path)
    assert said == []
    shutil.rmtree(tmp_path / "profile")
    said, night = open_in_browser(page, tmp_path, "--force-dark-mode")
    assert said == []
    assert brightness(day) > 0.8 > 0.3 > brightness(night)
    for picture, surface in ((day, 255), (night, 26)):
        pixels = imread(io.BytesIO(picture))[:, :, :3]
        # A section's picture: if it hadn't loaded, only the background's colour would be there.
        drawn = (abs(pixels[400:700, 150:700] - surface / 255).max(axis=2) > 0.2).mean()
        assert drawn > 0.01


def test_the_console_would_be_heard(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('oh')</script><img src='missing.png'>")
    assert len(open_in_browser(page, tmp_path)[0]) >= 1
