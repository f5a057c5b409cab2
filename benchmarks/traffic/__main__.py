"""`python -m benchmarks.traffic`: see benchmarks/traffic/norms.py."""

from benchmarks.traffic.norms import main

if __name__ == "__main__":
    raise SystemExit(main())
