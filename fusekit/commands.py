"""One function per command of the command line; each returns the exit code."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusekit.data import load_corpus
from fusekit.doctor import examine
from fusekit.gpt import GPTConfig
from fusekit.kernels.linear_cpu import multiplies
from fusekit.models import build_model
from fusekit.monitor import Monitor
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer

COMPARE_STEPS = 60  # enough for the loss curves to tell
SMALL = {"layers": 4, "width": 128, "heads": 4, "context": 128, "vocab": 2048}


def train(options: argparse.Namespace) -> int:
    if options.steps is None:
        options.steps = COMPARE_STEPS if options.compare else TrainConfig.steps
    config = TrainConfig(**_fields(TrainConfig, options))
    sizes, device = _sizes(options), _device(options)
    if options.compare:
        from fusekit.compare import Comparison, compare

        if device.type == "cpu" and not multiplies(torch.bfloat16) and sizes == asdict(GPTConfig()):
            sizes |= SMALL
            config = replace(config, context=SMALL["context"])
            print(
                "This CPU has no bf16 products: PyTorch emulates them, up to 40 times slower than float32. "
                "The comparison uses a smaller model; --width and the like choose another.",
                file=sys.stderr,
            )

        comparison = Comparison(
            config=replace(config, warmup=min(config.warmup, config.steps // 4)),
            sizes=sizes,
            folder=options.out or Path("runs/compare"),
            hf_config=options.hf_config,
            data=options.data,
            device=str(device),
            threads=options.threads,
            minutes=options.minutes,
        )
        return compare(comparison)
    folder = options.out or Path("runs/train")
    _refuse_to_overwrite(folder / "checkpoint.pt", options)
    corpus = load_corpus(options.data, vocab=sizes["vocab"], context=config.context, folder=folder)
    torch.manual_seed(config.seed)
    model = build_model(sizes, options.hf_config)
    monitor = Monitor(config.steps, title=f"{config.provider} {config.precision}", quiet=options.quiet)
    trainer = Trainer(
        model,
        corpus,
        config,
        folder,
        device=device,
        identity=sizes | {"hf_config": options.hf_config},
        monitor=monitor,
    )
    if options.resume:
        trainer.resume()
        monitor.say(f"continuing {folder} at step {trainer.step} of {config.steps}")
    trainer.fit()
    monitor.say(
        f"{trainer.step} steps, validation loss {trainer.validation_loss:.4f}; checkpoint.pt, metrics.jsonl "
        f"and loss.png are in {folder}"
    )
    return 0


def explain(options: argparse.Namespace) -> int:
    import fusekit

    model, batch = _optimized(options)
    model(*batch)
    return _print(fusekit.explain(model), options)


def verify(options: argparse.Namespace) -> int:
    import fusekit

    model, batch = _optimized(options)
    certificate = fusekit.verify(model, *batch)
    _print(certificate, options)
    return 0 if certificate.ok else 1


def bisect(options: argparse.Namespace) -> int:
    from fusekit.bisect import bisect_model

    model, batch = _optimized(options)
    result = bisect_model(model, *batch)
    _print(result, options)
    return 0 if not result.guilty else 1


def precision(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fusekit.plots import plot_precision
    from fusekit.precision_plan import PLAN_FILE, PrecisionPlan
    from fusekit.precision_report import summary, table

    plan = PrecisionPlan.load(options.plan / PLAN_FILE if options.plan.is_dir() else options.plan)
    if options.json:
        print(json.dumps(plan.rows(), indent=1))
    elif sys.stdout.isatty():  # its width and its colours
        Console().print(summary(plan.rows()), table(plan.rows()), sep="\n")
    else:
        print(plan)
    if options.plot is not None and not plot_precision(plan.rows(), options.plot):
        raise ValueError(
            f"{options.plot} was not drawn: matplotlib is missing, the folder cannot be written, or the plan "
            "has no layers"
        )
    return 0


def bench(options: argparse.Namespace) -> int:
    """The kernel suite, or another benchmark of the checkout by name, with its own options."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        raise ValueError(
            "the benchmarks are not part of the installed package: clone the repository and, from its "
            "folder, run python -m benchmarks, or make gpu on a machine with a CUDA GPU"
        )
    named = options.rest[:1] in (["models"], ["gpu"])
    module = f"benchmarks.{options.rest[0]}" if named else "benchmarks"
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.call(
        [sys.executable, "-m", module, *options.rest[named:]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def ops(options: argparse.Namespace) -> int:
    from fusekit.kernels import OPS

    for name, op in OPS.items():
        summary = (sys.modules[op.reference.__module__].__doc__ or "").strip().splitlines()
        print(f"{name:20} {summary[0] if summary else ''}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    return examine()


def _fields(config: type, options: argparse.Namespace) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in fields(config) if hasattr(options, f.name)}


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The model's sizes, checked, as plain values."""
    return asdict(GPTConfig(**_fields(GPTConfig, options), tied=not options.untied))


def _device(options: argparse.Namespace) -> torch.device:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads is at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is cpu, cuda, cuda:1 and so on, or auto; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu or cuda; {device.type} is not supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here; `fusekit doctor` says what it finds")
    return device


def _optimized(options: argparse.Namespace) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The model of the options under fusekit, and one random batch on its device."""
    import fusekit

    if options.batch < 1:
        raise ValueError(f"--batch is at least 1, got {options.batch}")
    sizes, device = _sizes(options), _device(options)
    torch.manual_seed(0)
    model = build_model(sizes, options.hf_config).to(device)
    shape = (options.batch, sizes["context"])
    batch = tuple(torch.randint(sizes["vocab"], shape, device=device) for _ in range(2))
    precision = "keep" if options.precision == "float32" else options.precision
    return fusekit.optimize(model, precision=precision), batch  # type: ignore[return-value]


def _print(result: Any, options: argparse.Namespace) -> int:
    print(json.dumps(result.to_dict(), indent=1) if options.json else str(result))
    return 0


def _refuse_to_overwrite(checkpoint: Path, options: argparse.Namespace) -> None:
    if checkpoint.exists() and not (options.resume or options.overwrite):
        raise ValueError(
            f"{checkpoint} exists: continue that run with --resume, start anew with --overwrite, or choose "
            f"another --out"
        )
