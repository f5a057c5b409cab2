"""`python -m benchmarks.static`: see benchmarks/static/lane.py."""

from benchmarks.static.lane import main

if __name__ == "__main__":
    raise SystemExit(main())
