"""The training loop: read `fit` and `train_step`, the rest are their parts.

One run is a folder: checkpoint.pt, metrics.jsonl, loss.png, with precision "auto" or a plan also
precision.json. A run that was killed at any moment and resumed ends with the same bits as one that was not:
the checkpoint holds weights, optimizer, loss scale, delayed FP8 scales, random generators, the position in
the data and the step, and the levels of precision "auto"; all else is a function of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.auto_precision import AutoPrecision
from fusekit.checkpoint import load_checkpoint, save_checkpoint
from fusekit.data import Batches, Corpus, validation_batches
from fusekit.interrupt import Interrupted, StopRequest
from fusekit.kernels.recipe import Recipe
from fusekit.loss_scaler import LossScaler
from fusekit.meter import Stopwatch, peak_memory
from fusekit.monitor import Metrics, Monitor, read_metrics
from fusekit.plots import plot_losses
from fusekit.precision_plan import PLAN_FILE
from fusekit.precision_state import PrecisionState, precision_state
from fusekit.session import auto_precision
from fusekit.train_config import TrainConfig, is_plan

# Settings that may differ between a checkpoint and the run that continues it.
MAY_CHANGE = ("steps", "validate_every", "checkpoint_every", "log_every")
FP16_PATIENCE = 10  # steps with an infinite loss before giving up: the loss scale needs a few to come down


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class Trainer:
    """Train `model` on `corpus` in `folder`. The model is called as model(tokens, targets) -> (_, loss).

    Args:
        identity: what the model is (sizes, type), as plain values; a checkpoint of another model is refused.
        stop_after: stop there although the schedule is made for config.steps; None is config.steps.
        watch: called with every record.
        precision: what `optimize` is given instead of config.precision, where that name does not say enough.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        config: TrainConfig,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        identity: dict[str, Any] | None = None,
        monitor: Monitor | None = None,
        stop_after: int | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
        precision: Recipe | AutoPrecision | None = None,
    ) -> None:
        self.device, self.config, self.folder, self.corpus = torch.device(device), config, folder, corpus
        self.identity = (identity or {}) | {"text": corpus.digest}
        self.last_step = min(config.steps, stop_after or config.steps)
        self.watch = watch or (lambda record: None)
        self.model = model.to(self.device).train()
        self.forward = provide(self.model, config, precision)
        self.precision = auto_precision(self.model) if config.decides else None
        ours = config.provider == "fusekit"
        self.scales = precision_state(self.model) if ours else PrecisionState(None)
        self.optimizer = make_optimizer(self.model, config, self.device)
        self.scaler = LossScaler(self.device, enabled=config.precision == "fp16")
        if self.scaler.is_enabled():  # read on the device, by steps that were not skipped
            rates = [config.learning_rate(step) for step in range(config.steps)]
            self.rates = torch.tensor(rates, device=self.device)
        self.batches = Batches(corpus.train, batch=config.batch, context=config.context, seed=config.seed)
        self.monitor = monitor or Monitor(self.last_step)
        self.step = self.saved_step = 0
        self.losses_lost = 0
        self.validation_loss = math.nan

    @property
    def tokens_per_step(self) -> int:
        return self.config.accumulate * self.config.batch * self.config.context

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def fit(self) -> None:
        """Train to the last step.

        Raises:
            TrainingError: the loss is not finite. CheckpointError: a checkpoint could not be written.
            Interrupted: Ctrl-C or SIGTERM came; the step in progress was finished and a checkpoint written.
        """
        config = self.config
        self.metrics = Metrics(self.folder / "metrics.jsonl", resume_at=self.step)
        self.watched, self.logged = Stopwatch(self.device), self.step
        try:
            with StopRequest(self.monitor.say) as stop, self.monitor:
                while self.step < self.last_step and not stop.signal:
                    loss, grad_norm = self.train_step()
                    self.step += 1
                    if self._due(config.log_every or (1 if self.device.type == "cpu" else 10)):
                        self.log(loss, grad_norm)
                    if self._due(config.validate_every):
                        self.validate()
                    if self._due(config.checkpoint_every):
                        self.save()
                if stop.signal and self.saved_step != self.step:
                    self.save()
        finally:
            self.metrics.close()
            plot_losses(read_metrics(self.metrics.path), self.folder / "loss.png")
        if stop.signal:
            raise Interrupted(stop.signal, self.step, self.checkpoint)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; the mean loss and the gradient norm, still on the device."""
        config, total = self.config, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        for _ in range(config.accumulate):
            tokens, targets = (t.to(self.device, non_blocking=True) for t in self.batches.next())
            with autocast(config, self.device):
                _, loss = self.forward(tokens, targets)
            self.scaler.scale(loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.scaler.require_finite(self.optimizer, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.precision is not None:
            self.precision.step(total, grad_norm)
        return total, grad_norm

    def learning_rate(self) -> float | Tensor:
        """Of this step. With a loss scale the schedule stands still while steps are skipped."""
        if not self.scaler.is_enabled():
            return self.config.learning_rate(self.step)
        return self.rates.take(self.step - self.scaler.skipped)

    def log(self, loss: Tensor, grad_norm: Tensor) -> None:
        value = loss.item()
        seconds, cpu_seconds = self.watched.lap()
        steps, self.logged = self.step - self.logged, self.step
        record = {
            "step": self.step,
            "loss": value,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "grad_norm": grad_norm.item(),
            "tokens_per_second": steps * self.tokens_per_step / seconds,
            "seconds": seconds / steps,
            "cpu_seconds": cpu_seconds / steps,
            "memory_bytes": peak_memory(self.device),
        }
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
            record["skipped_steps"] = int(self.scaler.skipped)
        self._report(record)
        self.losses_lost = 0 if math.isfinite(value) else self.losses_lost + 1
        if self.losses_lost > (FP16_PATIENCE if self.scaler.is_enabled() else 0):
            raise TrainingError(
                f"the loss is {value} at step {self.step}; the last checkpoint is untouched. Try a "
                f"smaller --lr, a longer --warmup, or --precision bf16"
            )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over fixed batches of the validation text."""
        config, losses = self.config, []
        self.model.eval()
        for tokens, targets in validation_batches(
            self.corpus.validation,
            batch=config.batch,
            context=config.context,
            limit=config.validation_batches,
        ):
            with autocast(config, self.device):
                _, loss = self.model(tokens.to(self.device), targets.to(self.device))
            losses.append(loss.float())
        self.model.train()
        self.validation_loss = torch.stack(losses).mean().item()
        self._report({"step": self.step, "validation_loss": self.validation_loss})
        self.watched.lap()
        return self.validation_loss

    def save(self) -> None:
        state = {
            "step": self.step,
            "position": self.batches.position,
            "config": asdict(self.config),
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scales": self.scales.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "validation_loss": self.validation_loss,
        }
        if self.precision is not None:
            state["precision"] = self.precision.state_dict()
        save_checkpoint(self.checkpoint, state)
        if self.precision is not None:
            self.precision.plan.save(self.folder / PLAN_FILE)
        self.saved_step = self.step
        self.watched.lap()

    def resume(self, path: Path | None = None) -> None:
        """Continue from a checkpoint, by default this run's own.

        Raises:
            CheckpointError: missing, damaged, or not ours.
            ValueError: made with other settings; they are named.
        """
        path = path or self.checkpoint
        state = load_checkpoint(path)
        now = {k: v for k, v in (asdict(self.config) | self.identity).items() if k not in MAY_CHANGE}
        then = asdict(TrainConfig()) | state["config"] | state["identity"]
        for settings in (now, then):  # however the path of a plan is spelled
            if is_plan(str(settings["precision"])):
                settings["precision"] = str(Path(settings["precision"]).resolve())
        differing = [f"{k} was {then.get(k)!r} and is {v!r}" for k, v in now.items() if then.get(k) != v]
        if differing:
            raise ValueError(
                f"{path} belongs to another run: {'; '.join(differing)}. Give the same options, or another "
                f"--out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.precision is not None:
            self.precision.load_state_dict(state["precision"])
        self.scales.load_state_dict(state.get("scales", {}))
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.step = self.saved_step = state["step"]
        self.batches.position = state["position"]
        self.validation_loss = state["validation_loss"]

    def _due(self, interval: int) -> bool:
        return self.step == self.last_step or (interval > 0 and self.step % interval == 0)

    def _report(self, record: dict[str, Any]) -> None:
        try:
            self.metrics.write(record)
        except OSError as error:
            raise TrainingError(
                f"{self.metrics.path} could not be written: {error.strerror or error}; the last checkpoint "
                f"is untouched. Make room, then continue with --resume"
            ) from None
        self.monitor.show(record)
        self.watch(record)


def provide(
    model: nn.Module, config: TrainConfig, precision: Recipe | AutoPrecision | None = None
) -> Callable[..., Any]:
    """What runs the forward pass. The model keeps its parameters and its state_dict in every case."""
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if config.provider == "compile":
        return torch.compile(model)
    if config.provider == "fusekit":
        import fusekit

        every = config.precision_every
        plan = config.precision if is_plan(config.precision) else None
        named: Any = {"float32": "keep"}.get(config.precision, config.precision)
        if config.decides:
            named = fusekit.AutoPrecision(every=every, calibration=every, plan=plan)
        return fusekit.optimize(model, precision=precision or named)
    return model


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """PyTorch's mixed precision; fusekit places its casts itself."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    if config.provider == "fusekit" or dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); matrices decay, gains and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.95), fused=fused)
