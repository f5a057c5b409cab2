"""The training loop: same bits after any interruption, and nothing lost when something goes wrong."""

import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fusekit.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from fusekit.data import Corpus
from fusekit.gpt import GPT, GPTConfig
from fusekit.interrupt import Interrupted
from fusekit.monitor import Monitor, read_metrics
from fusekit.precision_plan import PrecisionPlan
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer, TrainingError

SIZES = {"vocab": 64, "context": 16, "layers": 2, "heads": 2, "width": 16, "dropout": 0.1}


def make_trainer(folder, **overrides):
    """A tiny run whose text is a learnable sequence; dropout makes the random state matter."""
    settings = {"steps": 12, "batch": 2, "context": 16, "lr": 1e-2, "warmup": 2, "provider": "eager"}
    settings |= {"precision": "float32", "validate_every": 4, "checkpoint_every": 3, "validation_batches": 2}
    settings |= overrides
    stop_after = settings.pop("stop_after", None)
    tokens = torch.arange(4000) * 7 % 61
    corpus = Corpus(train=tokens[:3000], validation=tokens[3000:], vocab=64, digest="sevens")
    torch.manual_seed(settings.get("seed", 0))
    model = GPT(GPTConfig(**SIZES))
    return Trainer(
        model,
        corpus,
        TrainConfig(**settings),
        folder,
        identity=SIZES,
        monitor=Monitor(settings["steps"], quiet=True),
        stop_after=stop_after,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_loss_falls_and_every_file_is_written(tmp_path):
    trainer = make_trainer(tmp_path, steps=60)
    trainer.fit()
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 60 and losses[-1] < losses[0] - 1
    assert trainer.validation_loss < losses[0]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 60
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_stopping_anywhere_and_resuming_gives_the_same_bits(tmp_path, precision, accumulate):
    options = {"precision": precision, "accumulate": accumulate}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.fit()
    for stop_after in (5, 9):
        broken = make_trainer(tmp_path / "broken", **options, stop_after=stop_after)
        if stop_after > 5:
            broken.resume()
        broken.fit()
    resumed = make_trainer(tmp_path / "broken", **options)
    torch.manual_seed(123)  # whatever the generator holds in the new process
    resumed.resume()
    resumed.fit()
    assert_same_bits(weights(straight), weights(resumed))
    curves = [
        [(r["step"], r["loss"]) for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
        for name in ("straight", "broken")
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8-block", "fp8-delayed"])
def test_resuming_under_fusekit_gives_the_same_bits(tmp_path, precision):
    options = {"provider": "fusekit", "precision": precision, "steps": 8}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.fit()
    make_trainer(tmp_path / "broken", **options, stop_after=5).fit()
    resumed = make_trainer(tmp_path / "broken", **options)
    resumed.resume()
    resumed.fit()
    assert_same_bits(weights(straight), weights(resumed))


@pytest.mark.parametrize("stops", [(3, 11), (5, 6)])
def test_resuming_with_automatic_precision_replays_every_decision(tmp_path, monkeypatch, stops):
    """Stopped in the calibration, at its end, and between two samples."""
    monkeypatch.setattr("fusekit.precision_decisions.emulates_fp8", lambda value: False)  # as on a GPU
    options = {"provider": "fusekit", "precision": "auto", "precision_every": 5, "steps": 14, "accumulate": 2}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.fit()
    for i, stop_after in enumerate([*stops, None]):
        part = make_trainer(tmp_path / "broken", **options, stop_after=stop_after)
        if i:
            torch.manual_seed(123)
            part.resume()
        part.fit()
    assert_same_bits(weights(straight), weights(part))
    assert straight.precision.state_dict() == part.precision.state_dict()
    plans = [PrecisionPlan.load(tmp_path / name / "precision.json") for name in ("straight", "broken")]
    assert plans[0] == plans[1] == straight.precision.plan and plans[0].steps == 14
    assert straight.precision.live
    assert {row["samples"] for row in plans[0].rows()} == {6}  # of steps 0 to 4, and 9


SCRIPT = """
import sys, pathlib, time
sys.path.insert(0, sys.argv[3])
from test_trainer import make_trainer
trainer = make_trainer(pathlib.Path(sys.argv[1]), steps=40, checkpoint_every=2)
if sys.argv[2] == "resume":
    trainer.resume()
else:
    trainer.watch = lambda record: (print(record["step"], flush=True), time.sleep(0.05))
trainer.fit()
"""


def start(folder, mode):
    command = [sys.executable, "-c", SCRIPT, str(folder), mode, os.path.dirname(__file__)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_minus_9_then_resume_gives_the_same_bits(tmp_path):
    straight = make_trainer(tmp_path / "straight", steps=40, checkpoint_every=2)
    straight.fit()
    child = start(tmp_path / "killed", "fresh")
    while int(child.stdout.readline()) < 7:
        pass
    child.kill()
    child.wait()
    child.stdout.close(), child.stderr.close()
    assert 0 < load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["step"] < 40
    again = start(tmp_path / "killed", "resume")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    resumed = load_checkpoint(tmp_path / "killed" / "checkpoint.pt")
    assert resumed["step"] == 40
    assert_same_bits(weights(straight), resumed["model"])
    steps = [r["step"] for r in read_metrics(tmp_path / "killed" / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 41))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    trainer = make_trainer(tmp_path, checkpoint_every=0)
    trainer.watch = lambda record: os.kill(os.getpid(), number) if record["step"] == 5 else None
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as error:
        trainer.fit()
    assert error.value.exit_code == 128 + number
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == trainer.step == 5
    assert signal.getsignal(number) is before
    straight = make_trainer(tmp_path / "straight")
    straight.fit()
    resumed = make_trainer(tmp_path)
    resumed.resume()
    resumed.fit()
    assert_same_bits(weights(straight), weights(resumed))


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)

    def twice(record):
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    trainer.watch = twice
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, stop_after=3)
    trainer.fit()
    whole = (tmp_path / "checkpoint.pt").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    trainer = make_trainer(tmp_path)
    trainer.resume()
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*earlier checkpoint.*intact.*--resume"
    ):
        trainer.fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is a Linux device")
def test_a_write_to_a_full_device_is_a_sentence(tmp_path):
    (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left on device; there is no earlier checkpoint"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"model": torch.zeros(1 << 20)})


def test_full_disk_under_the_metrics_is_a_sentence(tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fusekit.monitor.Metrics.write", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        make_trainer(tmp_path).fit()


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = bytearray()
    elif how == "text":
        raw = bytearray(b"hello")
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_named(tmp_path, how):
    make_trainer(tmp_path, stop_after=3).fit()
    damage(tmp_path / "checkpoint.pt", how)
    with pytest.raises(CheckpointError, match="is damaged"):
        make_trainer(tmp_path).resume()


def test_any_flipped_bit_of_the_weights_is_noticed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"model": torch.ones(1000)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(torch.ones(100).numpy().tobytes()) + 200] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_foreign_checkpoint_is_refused_and_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "checkpoint.pt"
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="was not written by"):
        load_checkpoint(path)
    torch.save({"format": Evil()}, path)
    with pytest.raises(CheckpointError, match="is damaged, or no checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_missing_checkpoint_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        make_trainer(tmp_path).resume()


def test_a_checkpoint_of_other_settings_names_them(tmp_path):
    make_trainer(tmp_path, stop_after=3).fit()
    with pytest.raises(ValueError, match=r"batch was 2 and is 4.*seed was 0 and is 1"):
        make_trainer(tmp_path, batch=4, seed=1).resume()
    longer = make_trainer(tmp_path, steps=20)
    longer.resume()
    longer.fit()
    assert longer.step == 20


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    trainer = make_trainer(tmp_path, stop_after=3)
    trainer.fit()
    trainer = make_trainer(tmp_path)
    trainer.resume()
    with torch.no_grad():
        trainer.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4.*smaller --lr"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_accumulation_equals_one_large_batch(tmp_path):
    def gradient(batch, accumulate):
        trainer = make_trainer(tmp_path, batch=batch, accumulate=accumulate, weight_decay=0.0)
        trainer.model.eval()  # dropout draws differently for another batch
        trainer.optimizer.step = lambda *args, **kwargs: None
        trainer.optimizer.zero_grad = lambda *args, **kwargs: None
        loss, norm = trainer.train_step()
        return loss, norm

    for large, small in zip(gradient(6, 1), gradient(2, 3), strict=True):
        torch.testing.assert_close(large, small, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("provider", ["eager", "fusekit"])
def test_an_overflow_in_fp16_skips_the_step_and_its_learning_rate(tmp_path, provider):
    trainer = make_trainer(tmp_path, precision="fp16", provider=provider, steps=4)
    backward, calls = torch.Tensor.backward, []

    def poisoned(loss, *args, **kwargs):
        backward(loss, *args, **kwargs)
        calls.append(loss)
        if len(calls) == 2:
            trainer.model.norm.weight.grad[0] = math.inf

    before = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", poisoned)
        rates = []
        for _ in range(4):
            before = weights(trainer) if trainer.step == 1 else before
            trainer.train_step()
            if trainer.step == 1:
                assert_same_bits(weights(trainer), before)
            trainer.step += 1
            rates.append(float(trainer.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([trainer.config.learning_rate(i) for i in (0, 1, 1, 2)])
    assert trainer.scaler.get_scale() == 32768.0 and int(trainer.scaler.skipped) == 1


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [config.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert rates[9] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"precision": "int3"}, "precision is one of float32, tf32, fp16, bf16"),
        ({"provider": "magic"}, "provider is one of"),
        ({"steps": 0}, "steps is at least 1"),
        ({"lr": -1.0}, "lr is greater than 0"),
        ({"lr": math.nan}, "lr is greater than 0"),
        ({"warmup": -1}, "warmup is not negative"),
    ],
)
def test_bad_settings_are_refused_when_made(setting, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**setting)


def test_metrics_survive_a_line_cut_by_a_crash(tmp_path):
    make_trainer(tmp_path, stop_after=3).fit()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    resumed = make_trainer(tmp_path)
    resumed.resume()
    resumed.fit()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, 13))
