"""One file that holds a whole run, replaced atomically: after a crash it is old or new, never half."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "fusekit checkpoint 1"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which and what to do."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, durable once this returns.

    Raises:
        CheckpointError: it could not be written (disk full, no permission). What was at `path` is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:  # given a path, torch hides the OSError
            torch.save({"format": FORMAT, "checksum": checksum(state), "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        kept = (
            f"the earlier checkpoint {path} is intact" if path.exists() else "there is no earlier checkpoint"
        )
        raise CheckpointError(
            f"the checkpoint could not be written to {path}: {error.strerror or error}; {kept}. Make room or "
            f"choose another folder with --out, then continue with --resume"
        ) from None
    except BaseException:  # a second Ctrl-C while writing
        _remove(temporary)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, with every tensor on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: missing, damaged, or not written by fusekit.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}; leave out --resume to start from the beginning"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise CheckpointError(f"the checkpoint {path} may not be read by this user") from None
    except Exception:  # torch raises half a dozen types, with texts that advise to switch weights_only off
        raise CheckpointError(
            f"{path} is damaged, or no checkpoint at all; restore a copy, or start again with another --out"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by `fusekit train` of this version; nothing was changed"
        )
    if checksum(content["state"]) != content["checksum"]:
        raise CheckpointError(
            f"{path} is damaged (its checksum differs); restore it from a copy, or start again"
        )
    return content["state"]


def checksum(value: Any, start: int = 0) -> int:
    """CRC-32 over all tensors and plain values: torch.load sees a cut file, but not every flipped bit."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(raw.tobytes(), zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode(), start))
    if isinstance(value, dict):
        for key, item in value.items():
            start = checksum(item, zlib.crc32(repr(key).encode(), start))
        return start
    if isinstance(value, (list, tuple)):
        for item in value:
            start = checksum(item, start)
        return start
    return zlib.crc32(repr(value).encode(), start)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and rename is durable by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a failing disk may refuse this too; the name is never read
        path.unlink(missing_ok=True)
