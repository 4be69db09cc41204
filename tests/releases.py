"""What some releases of the libraries don't have yet."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def has(package: str, release: str) -> bool:
    """Whether the package that is installed is of this release or a later one."""
    return Version(version(package)) >= Version(release)


def needs(package: str, release: str, what: str) -> pytest.MarkDecorator:
    """Skips a test of `what` this release of the package brought."""
    return pytest.mark.skipif(not has(package, release), reason=f"{package} {release} brought {what}")
