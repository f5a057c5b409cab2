"""The command line. An error is a sentence on stderr and a non-zero exit code; FUSEKIT_DEBUG=1 adds where."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import fusekit
from fusekit.gpt import GPTConfig
from fusekit.train_config import PRECISIONS, PROVIDERS, TrainConfig, check_precision

TRAIN_OPTIONS = {
    "steps": "optimizer steps, 60 with --compare",
    "batch": "rows per batch",
    "accumulate": "batches per optimizer step",
    "lr": "peak learning rate",
    "warmup": "steps of linear warm-up before the cosine",
    "weight_decay": "decay of matrices",
    "clip": "largest gradient norm",
    "seed": "of the weights, the order of the data and dropout",
    "validate_every": "steps between validations; 0: only at the end",
    "validation_batches": "batches per validation",
    "checkpoint_every": "steps between checkpoints; 0: only at the end",
    "precision_every": "with --precision auto or a plan: steps of a calibration, and between later samples",
    "log_every": "steps between log lines; 0: 1 on a CPU, 10 on a GPU",
}
MODEL_OPTIONS = {
    "layers": "transformer blocks",
    "width": "features of the residual stream",
    "heads": "attention heads",
    "context": "tokens per row",
    "vocab": "entries of the BPE vocabulary",
    "dropout": "dropout probability",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        run = getattr(importlib.import_module("fusekit.commands"), options.command)
        return run(options) or 0
    except KeyboardInterrupt:
        print("fusekit: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of `fusekit ops | head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("FUSEKIT_DEBUG"):
            traceback.print_exc()
        print(f"fusekit {options.command}: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _precision(text: str) -> str:
    try:
        return check_precision(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _sentence(error: Exception) -> str:
    text = str(error).strip() or "no further description"
    ours = isinstance(error, ValueError) or type(error).__module__.startswith("fusekit")
    return text if ours else f"{type(error).__name__}: {text.splitlines()[0]} (FUSEKIT_DEBUG=1 shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusekit", description=fusekit.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    train = command("train", "train a GPT or a Hugging Face causal LM on a text file")
    _add_fields(train, TrainConfig, TRAIN_OPTIONS)
    train.set_defaults(steps=None)
    train.add_argument(
        "--provider", choices=PROVIDERS, default="fusekit", help="who runs the model (default fusekit)"
    )
    train.add_argument("--data", metavar="FILE", help="UTF-8 text; default: the documentation inside CPython")
    train.add_argument(
        "--out", type=Path, help="folder of the run (default runs/train, with --compare runs/compare)"
    )
    train.add_argument("--resume", action="store_true", help="continue the run in --out from its checkpoint")
    train.add_argument(
        "--overwrite", action="store_true", help="start anew although --out holds a checkpoint"
    )
    train.add_argument(
        "--compare", action="store_true", help="eager, autocast, torch.compile and fusekit side by side"
    )
    train.add_argument(
        "--minutes", type=float, default=4.5, help="with --compare: about how long it may take (default 4.5)"
    )
    train.add_argument("--quiet", action="store_true", help="no progress")

    for name, text in (
        ("explain", "what fusekit fuses in a model, what it refuses, and why"),
        ("verify", "check every fused site of a model against float64, forward and backward"),
        ("bisect", "find the fused sites that move loss or gradients away from eager"),
    ):
        added = command(name, text)
        added.add_argument("--batch", type=int, default=2, help="rows of the example batch (default 2)")
        added.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for name in ("train", "explain", "verify", "bisect"):
        _add_model(commands.choices[name])

    precision = command("precision", "the levels that precision auto chose in a run, as a table and a plot")
    precision.add_argument("plan", type=Path, help="a plan file, or the folder of a run of `fusekit train`")
    precision.add_argument("--plot", type=Path, metavar="PNG", help="also draw it there")
    precision.add_argument("--json", action="store_true", help="print JSON instead of a table")

    # Its options, --help included, are the benchmark's own: no prefix makes any of them an option here.
    bench = commands.add_parser(
        "bench",
        help="measure every op against eager, torch.compile and other libraries, from a checkout",
        prefix_chars="\0",
        add_help=False,
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    command("ops", "list the fused ops")
    command("doctor", "what is installed, what can run here, and what to install")
    return parser


def _add_fields(parser: argparse.ArgumentParser, config: type, options: dict[str, str]) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, text in options.items():
        flag, default = "--" + name.replace("_", "-"), defaults[name]
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default {default})")


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_fields(parser, GPTConfig, MODEL_OPTIONS)
    parser.add_argument(
        "--untied", action="store_true", help="the head has weights of its own (17.0 M by default)"
    )
    parser.add_argument(
        "--precision", type=_precision, default="bf16", metavar="NAME|PLAN",
        help=f"of matmuls and attention: {', '.join(PRECISIONS)}, or a plan that auto made of the same model "
        "(*.json) (default bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--hf-config", metavar="TYPE|PATH", help="a transformers model type (llama) or its config.json"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
