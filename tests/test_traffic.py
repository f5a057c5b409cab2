"""The norm kernels move little more than the least possible bytes, and the counting counts."""

import json

import numpy as np
import pytest

from benchmarks.traffic import norms as traffic
from fusekit.kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def test_counter_counts_each_byte_once_and_only_active_lanes():
    counter = traffic.Counter()
    counter.starts = [1000, 5000]
    counter.read, counter.written = ([np.zeros(64, bool), np.zeros(64, bool)] for _ in range(2))
    addresses = np.array([5000, 5002, 5002, 5004])
    counter.mark(counter.read, addresses, np.array([True, True, True, False]), 2)
    assert counter.bytes == 4
    counter.mark(counter.read, addresses, np.array([True, True, True, False]), 2)  # again: from the cache
    assert counter.bytes == 4
    counter.mark(counter.written, np.array([1000]), np.array([True]), 4)
    assert counter.bytes == 8


def test_counted_bytes_of_small_norms_are_what_the_kernels_say():
    """One block of rows to a program, so that every byte beyond the minimum can be named."""
    M, N = 48, 96
    for name, r in traffic.measure(M, N).items():
        assert r["minimum"] == traffic.minimum(name.split()[0], M, N, 2)[name.split()[1]]
        extra = r["counted"] - r["minimum"]
        statistics = (8 if "layer" in name else 4) * M
        if name.endswith("forward"):
            assert extra in (0, statistics)
        else:  # partial rows of float32, written and read, besides statistics
            row = (2 if "layer" in name else 1) * N * 4 * 2
            assert extra >= row and (extra % row in (0, statistics % row))


def test_recorded_traffic_is_within_five_percent():
    recorded = json.loads(traffic.RESULTS.read_text())
    assert len(recorded) == 4
    for name, r in recorded.items():
        assert 1.0 <= r["ratio"] <= traffic.LIMIT, name
        assert r["counted"] == pytest.approx(r["ratio"] * r["minimum"], rel=1e-4)
