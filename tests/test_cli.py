"""The command line: every command works, every mistake is a sentence on stderr and a non-zero exit code."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fusekit.cli import main
from fusekit.commands import SMALL
from fusekit.gpt import GPTConfig
from fusekit.kernels import OPS

TINY = ["--layers=1", "--heads=2", "--width=16", "--context=16", "--vocab=300"]
EAGER = [*TINY, "--provider=eager", "--precision=float32", "--steps=4", "--batch=2", "--warmup=1", "--quiet"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away. " * 80)
    return str(path)


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def assert_sentence(code, errors, *words):
    assert code != 0
    assert errors.startswith("fusekit ") and "Traceback" not in errors
    for word in words:
        assert word in errors


def test_train_writes_a_run_and_resumes_it(capsys, tmp_path, text):
    out = tmp_path / "run"
    assert run(capsys, "train", *EAGER, "--data", text, "--out", out)[0] == 0
    assert {"checkpoint.pt", "metrics.jsonl", "loss.png"} <= {p.name for p in out.iterdir()}
    code, _, errors = run(capsys, "train", *EAGER, "--data", text, "--out", out)
    assert_sentence(code, errors, "exists", "--resume", "--overwrite")
    assert run(capsys, "train", *EAGER, "--steps=6", "--data", text, "--out", out, "--resume")[0] == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert run(capsys, "train", *EAGER, "--data", text, "--out", out, "--overwrite")[0] == 0


def test_train_with_fusekit(capsys, tmp_path, text):
    options = [*EAGER, "--provider=fusekit", "--data", text, "--out", tmp_path / "run"]
    assert run(capsys, "train", *options)[0] == 0


def test_a_plan_of_one_run_is_followed_by_another(capsys, tmp_path, text):
    fusekit = [*EAGER, "--provider=fusekit", "--data", text]
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--precision=auto", "--precision-every=2", "--out", first]
    assert run(capsys, "train", *fusekit, *options)[0] == 0
    plan = json.loads((first / "precision.json").read_text())
    for product in plan["layers"]["blocks.0.expand"]["products"].values():
        product |= {"level": 2, "reason": "planted"}
    kept = tmp_path / "plan.json"
    kept.write_text(json.dumps(plan))
    given = ["--precision", kept, "--out", second]
    assert run(capsys, "train", *fusekit, *given)[0] == 0
    rows = json.loads(run(capsys, "precision", second, "--json")[1])
    bf16 = {row["layer"] for row in rows if row["level"] == "bf16"}
    assert bf16 == {"blocks.0.expand"} and {"planted"} <= {row["reason"] for row in rows}
    assert run(capsys, "train", *fusekit, *given, "--steps=6", "--resume")[0] == 0
    assert run(capsys, "explain", *TINY, "--precision", kept)[0] == 0


def test_a_plan_that_does_not_fit_is_refused(capsys, tmp_path, text):
    fusekit = [*EAGER, "--provider=fusekit", "--data", text, "--out", tmp_path / "run"]
    first = tmp_path / "first"
    assert run(capsys, "train", *fusekit[:-1], first, "--precision=auto", "--precision-every=2")[0] == 0
    given = [*fusekit, "--precision", first / "precision.json"]
    code, _, errors = run(capsys, "train", *given, "--width=32")
    assert_sentence(code, errors, "made for another model than this GPT", "300×32 and was 300×16")
    code, _, errors = run(capsys, "train", *given, "--provider=eager")
    assert_sentence(code, errors, "is fusekit's own")
    code, _, errors = run(capsys, "train", *fusekit, "--precision", tmp_path / "none.json")
    assert_sentence(code, errors, "none.json cannot be read")
    (tmp_path / "other.json").write_text('{"format": "another"}')
    code, _, errors = run(capsys, "train", *fusekit, "--precision", tmp_path / "other.json")
    assert_sentence(code, errors, "is no precision plan of fusekit")


def test_train_a_hugging_face_model(tmp_path, text):
    pytest.importorskip("transformers")
    command = [sys.executable, "-P", "-m", "fusekit", "train", *EAGER, "--hf-config=llama"]
    command += ["--data", text, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data=/no/such/file"], ["/no/such/file", "does not exist"]),
        (["--width=17"], ["width 17", "heads"]),
        (["--lr=-1"], ["lr is greater than 0"]),
        (["--resume"], ["there is no checkpoint"]),
        (["--device=tpu"], ["--device"]),
        (["--threads=0"], ["--threads"]),
        (["--vocab=100"], ["at least 257"]),
        (["--context=100000"], ["too short"]),
        (["--hf-config=nonsense"], ["nonsense"]),
        (["--compare", "--minutes=0"], ["--minutes"]),
    ],
)
def test_mistakes_in_train_are_sentences(capsys, tmp_path, text, options, words):
    if options[0].startswith("--hf-config"):
        pytest.importorskip("transformers")
    code, _, errors = run(capsys, "train", *EAGER, "--data", text, "--out", tmp_path / "run", *options)
    assert_sentence(code, errors, *words)


def test_a_damaged_checkpoint_is_a_sentence(capsys, tmp_path, text):
    out = tmp_path / "run"
    assert run(capsys, "train", *EAGER, "--data", text, "--out", out)[0] == 0
    (out / "checkpoint.pt").write_bytes(b"garbage")
    code, _, errors = run(capsys, "train", *EAGER, "--data", text, "--out", out, "--resume")
    assert_sentence(code, errors, "is damaged")
    assert (out / "checkpoint.pt").read_bytes() == b"garbage"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_names_the_remedy(capsys):
    code, _, errors = run(capsys, "explain", *TINY, "--device=cuda")
    assert_sentence(code, errors, "fusekit doctor")


def test_unknown_commands_and_choices_exit_with_2(capsys):
    for arguments in (["fly"], ["train", "--precision=fp3"], []):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    errors = capsys.readouterr().err
    assert "invalid choice" in errors and "or a plan file (*.json); got 'fp3'" in errors


def test_an_unforeseen_error_is_one_line_too(capsys, monkeypatch):
    def fail(options):
        raise KeyError("surprise")

    monkeypatch.setattr("fusekit.commands.ops", fail)
    monkeypatch.delenv("FUSEKIT_DEBUG", raising=False)
    code, _, errors = run(capsys, "ops")
    assert_sentence(code, errors, "KeyError", "surprise", "FUSEKIT_DEBUG=1")
    assert len(errors.splitlines()) == 1


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusekit.commands.ops", stop)
    assert run(capsys, "ops")[0] == 130


def test_ops_lists_the_registry(capsys):
    code, output, _ = run(capsys, "ops")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == list(OPS)


def test_doctor_names_versions_and_lanes(capsys):
    code, output, _ = run(capsys, "doctor")
    assert code == 0
    assert torch.__version__ in output
    for lane in ("native lane", "sanitizer lane", "static lane", "gpu lane"):
        assert lane in output


def test_explain_of_the_builtin_model(capsys):
    code, output, _ = run(capsys, "explain", *TINY, "--json", "--precision=float32")
    assert code == 0
    assert json.loads(output)["graphs"] == 1


def test_verify_of_the_builtin_model(capsys):
    code, output, _ = run(capsys, "verify", *TINY, "--json", "--precision=float32")
    assert code == 0
    assert json.loads(output)["ok"] is True


def test_fp8_on_the_command_line(capsys):
    code, output, _ = run(capsys, "verify", *TINY, "--json", "--precision=fp8-rowwise")
    certificate = json.loads(output)
    assert code == 0 and "linear_fp8" in {site["op"] for site in certificate["sites"]}
    code, _, errors = run(capsys, "train", *TINY, "--provider=eager", "--precision=fp8")
    assert_sentence(code, errors, "precision fp8 is fusekit's own")


def test_precision_of_a_run_as_table_json_and_plot(capsys, tmp_path, text):
    out, picture = tmp_path / "run", tmp_path / "levels.png"
    options = [
        *EAGER,
        "--provider=fusekit",
        "--precision=auto",
        "--precision-every=2",
        "--data",
        text,
        "--out",
        out,
    ]
    assert run(capsys, "train", *options)[0] == 0
    code, table, errors = run(capsys, "precision", out, "--plot", picture)
    assert code == 0 and not errors and "4 layers, 12 products" in table and "blocks.0.expand" in table
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, rows, _ = run(capsys, "precision", out / "precision.json", "--json")
    rows = json.loads(rows)
    assert code == 0 and len(rows) == 12
    assert {row["product"] for row in rows} == {"output", "grad_input", "grad_weight"}
    assert all(row["runs"] in ("tensor", "row", "bf16") and row["statistics"] for row in rows)
    code, _, errors = run(capsys, "precision", tmp_path)
    assert_sentence(code, errors, "cannot be read", "precision.json")
    code, _, errors = run(capsys, "precision", out, "--plot", tmp_path / "no" / "such" / "folder.png")
    assert_sentence(code, errors, "was not drawn")


def test_bisect_of_the_builtin_model(capsys):
    code, output, _ = run(capsys, "bisect", *TINY, "--json", "--precision=float32")
    assert code == 0
    assert json.loads(output)["guilty"] == []


def test_bench_passes_its_options_on_or_says_where_the_benchmarks_are(capsys, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("subprocess.call", lambda command, env: calls.append(command[2:]) or 0)
    for options in (["--compare", "old.json", "new.json"], ["--help"], [], ["models", "--minutes", "3"]):
        assert run(capsys, "bench", *options)[0] == 0
    assert calls == [
        ["benchmarks", "--compare", "old.json", "new.json"],
        ["benchmarks", "--help"],
        ["benchmarks"],
        ["benchmarks.models", "--minutes", "3"],
    ]
    monkeypatch.setattr(
        "fusekit.commands.__file__", str(tmp_path / "site-packages" / "fusekit" / "commands.py")
    )
    code, _, errors = run(capsys, "bench")
    assert_sentence(code, errors, "clone the repository", "make gpu")


def test_the_small_demo_model_is_a_model():
    assert GPTConfig(**SMALL).context == SMALL["context"]
