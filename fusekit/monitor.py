"""What a run tells while it goes: a progress bar or plain lines, and JSON lines in metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0  # without a terminal, how often a line is printed


class Metrics:
    """Append-only JSON lines. Opening it for a resumed run drops what came after the checkpoint."""

    def __init__(self, path: Path, *, resume_at: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(path) if r["step"] <= resume_at] if resume_at else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class Monitor:
    """Shows records as they come. A bar on a terminal; elsewhere a line every few seconds and at the end."""

    def __init__(
        self, total: int, *, title: str = "train", console: Console | None = None, quiet: bool = False
    ) -> None:
        self.total, self.title = total, title
        self.console = console or Console(stderr=True, quiet=quiet)
        self._last_line = 0.0
        self._shown: dict[str, Any] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, numbers="")

    def __enter__(self) -> Monitor:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        self._shown |= record
        step, numbers = self._shown["step"], describe(self._shown)
        self._bar.update(self._task, completed=step, numbers=numbers)
        if self._bar.disable and (
            time.monotonic() - self._last_line > LINE_SECONDS or step in (1, self.total)
        ):
            self._last_line = time.monotonic()
            self.console.print(f"{self.title} {step}/{self.total} {numbers}", highlight=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """What is going on while there is no step to show."""
        self._bar.update(self._task, numbers=text)
        if self._bar.disable and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{self.title} {text}", highlight=False, soft_wrap=True)

    def say(self, sentence: str) -> None:
        (self._bar.console if not self._bar.disable else self.console).print(
            sentence, highlight=False, soft_wrap=True
        )


def describe(record: dict[str, Any]) -> str:
    """The numbers of a record, in the order in which one looks at them."""
    forms = (
        ("loss", "loss {:.3f}"),
        ("validation_loss", "val {:.3f}"),
        ("lr", "lr {:.1e}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
        ("memory_bytes", "{} MB"),
    )
    parts = []
    for name, form in forms:
        if name in record:
            value = round(record[name] / 2**20) if name == "memory_bytes" else record[name]
            parts.append(form.format(value))
    return " ".join(parts)
