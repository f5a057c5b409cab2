"""Two processes that meet through gloo and run one script: for tests of what ranks agree on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEET = """
import os, sys, torch, torch.distributed as dist
rank, arguments = int(sys.argv[1]), sys.argv[3:]
sys.path.insert(0, {tests!r})
dist.init_process_group("gloo", init_method=f"file://{{sys.argv[2]}}", rank=rank, world_size=2)
"""

# Without the interpreter's own end: PyTorch's C++ threads may free tensors while it is torn down, which
# aborts one process in about twenty after all of its work (eager FSDP2 by itself does; "terminate called
# without an active exception"). A script that fails never gets here, and ends with its own exit code.
PART = """
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def outputs_of(script: str, folder: Path, *arguments: str) -> list[str]:
    """What each of the two ranks prints.

    The script finds `rank`, `arguments` and an open process group, and the modules beside this one.

    Raises:
        AssertionError: if a rank ends with an error; it holds what both printed.
    """
    code = MEET.format(tests=str(Path(__file__).parent)) + script + PART
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder / "store"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), outputs
    return [printed for printed, _ in outputs]
