"""`python -m benchmarks.traffic`: see benchmarks/traffic/command.py."""

from benchmarks.traffic.command import main

if __name__ == "__main__":
    raise SystemExit(main())
