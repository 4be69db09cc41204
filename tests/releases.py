"""Skip tests of features that the installed releases don't have."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def has(package: str, release: str) -> bool:
    """Return whether the installed package is this release or a later one."""
    return Version(version(package)) >= Version(release)


def needs(package: str, release: str, what: str) -> pytest.MarkDecorator:
    """Skip a test of `what`, a feature that this release of the package added."""
    return pytest.mark.skipif(not has(package, release), reason=f"{package} {release} brought {what}")
