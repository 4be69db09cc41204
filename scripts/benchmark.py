"""Run one of the benchmarks of `scripts/benchmarks`: `python scripts/benchmark.py engine ...`."""

import sys
from importlib import import_module
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the benchmark that the first argument names, and pass it the others.

    Returns:
        The exit code.
    """
    names = sorted(path.stem for path in (Path(__file__).parent / "benchmarks").glob("[a-z]*.py"))
    if not argv or argv[0] not in names:
        print(f"usage: python scripts/benchmark.py {{{','.join(names)}}} ...", file=sys.stderr)
        return 2
    return import_module(f"benchmarks.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
