"""The wheel, installed into an empty folder, imports and computes; without Triton too, as on macOS."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from fusekit.kernels import OPS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "fusekit", "kernels", "passes"):
        (source / name).symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_wheel_is_pure_python_and_whole(wheel: Path) -> None:
    assert wheel.name.startswith("fusekit_compiler-") and wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (
        ("fusekit", "fusekit"),
        ("kernels", "fusekit/kernels"),
        ("passes", "fusekit/passes"),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder)}" in names
    assert {f"fusekit/kernels/configs/sm_{arch}.json" for arch in (80, 90, 100)} <= names
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"fusekit"}, "a top-level package named kernels would shadow Hugging Face's"


PROGRAM = """
    import sys
    blocked = {blocked!r}

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in blocked:
                raise ImportError(name + " is blocked by the test")

    sys.meta_path.insert(0, Block())
    sys.path.insert(0, {site!r})
    import torch
    import fusekit
    from fusekit.kernels import OPS
    from fusekit.kernels._triton import HAS_TRITON
    import fusekit.passes

    assert fusekit.__file__.startswith({site!r}), fusekit.__file__
    assert HAS_TRITON != ("triton" in blocked)
    for name, op in OPS.items():
        sample = next(iter(op.samples("cpu", torch.float32)))
        returned = op.fused(*sample.args)
        output = returned if isinstance(returned, torch.Tensor) else returned[0]
        output.sum().backward()
        assert output.isfinite().all(), name
    print("ran", len(OPS), "ops")
"""


@pytest.mark.parametrize("blocked", [[], ["triton"]], ids=["with triton", "without triton"])
def test_native_path_works_from_the_wheel(installed: Path, tmp_path: Path, blocked: list[str]) -> None:
    if not blocked:
        pytest.importorskip("triton")
    program = textwrap.dedent(PROGRAM).format(blocked=blocked, site=str(installed))
    # An editable install's finder would come before the wheel: -S keeps it out, PYTHONPATH brings torch.
    packages = [p for p in sys.path if p.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"ran {len(OPS)} ops" in done.stdout
