"""The studies of `docs/evidence.md`, run by `scripts/evidence.py`."""
