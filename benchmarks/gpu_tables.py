"""Tables of what was measured on a GPU: training steps, attention, FP8 layers, matrix products.

Files: benchmarks/results/gpu_h100.json and fp8_layers_h100.json, and the tuned table of the device.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.results_file import CHECKOUT, RESULTS

Rows = list[tuple[Any, ...]]
Described = tuple[str, tuple[str, ...], Rows]  # title, headings, rows
TUNED = CHECKOUT / "kernels" / "configs" / "nvidia_h100_80gb_hbm3.json"
DIRECTIONS = ("forward", "forward+backward")


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _where(found: dict[str, Any]) -> str:
    machine = found["environment"]
    return (
        f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit']}"
    )


def steps() -> Described:
    found, rows = _load("gpu_h100.json"), []
    first = found["steps"][0]["waited_ms"]
    for cell in found["steps"]:
        rows.append((
            cell["model"], cell["provider"], f"{cell['waited_ms']:.1f}", f"{first / cell['waited_ms']:.2f}×",
            f"{cell['host_ms']:.1f}", f"{cell['peak_bytes'] / 1e6:,.0f}", f"{cell['losses'][-1]:.4f}",
        ))  # fmt: skip
    title = (
        "Training step of 16,384 tokens: forward, backward, clipping, fused AdamW, the loss read after each; "
        f"medians of ten ({_where(found)}). "
        "Host: until the step is handed to the GPU. Loss: after 15 steps:\n\n"
    )
    return title, ("model", "", "ms/step", "speed", "host ms", "peak MB", "loss"), rows


def attention() -> Described:
    found, rows = _load("gpu_h100.json"), []
    for a in found["attention"]:
        flash = (f"{a[name]}" if name in a else "" for name in ("flash2_forward", "flash2_backward"))
        sees = "causal" if a["causal"] else "full"
        shape = f"{a['batch']}×{a['heads']}×{a['tokens']:,}×{a['features']}"
        own = (a["own_forward"], a["own_backward"], a["chosen_forward"])
        rows.append((shape, sees, *own, a["cudnn_forward"], a["cudnn_backward"], *flash))
    title = (
        f"Attention in bf16, TFLOP/s ({_where(found)}). The forward pass is cuDNN's where it was chosen; "
        "the backward pass is always the own, because two runs of cuDNN's differ in their bits:\n\n"
    )
    headings = (
        "batch × heads × tokens × features", "", "own forward", "own backward", "chosen forward",
        "cuDNN forward", "cuDNN backward", "flash 2 forward", "flash 2 backward",
    )  # fmt: skip
    return title, headings, rows


def fp8_layers() -> Described:
    found, rows = _load("fp8_layers_h100.json"), []
    cells = found["cells"]
    layers = list(dict.fromkeys(name.split(" ")[0] for name in cells))
    presets = [p for p in dict.fromkeys(name.split(" ")[1] for name in cells) if p != "bf16"]
    for layer in layers:
        for preset in presets:
            times = [
                (cells[f"{layer} bf16 {d}"]["seconds"], cells[f"{layer} {preset} {d}"]["seconds"])
                for d in DIRECTIONS
            ]
            shown = (f"{1e3 * fp8:.2f}" for _, fp8 in times)
            gains = (f"{low / fp8:.2f}×" for low, fp8 in times)
            rows.append((layer.replace("x", "×"), f"`{preset}`", *shown, *gains))
    title = "FP8 linear layers, tokens × inputs × outputs, casts included, beside PyTorch's bf16 "
    title += f"({_where(found)}):\n\n"
    headings = (
        "layer", "preset", "forward ms", "forward + backward ms", "forward gain", "forward + backward gain",
    )  # fmt: skip
    return title, headings, rows


def fp8_sums() -> Described:
    found = _load("fp8_layers_h100.json")
    rows = [
        (name, f"{cell['relative']:.1e}", f"{cell['bias']:+.1e}") for name, cell in found["errors"].items()
    ]
    title = f"How FP8 sums are kept: errors against float64 sums of the same codes ({_where(found)}):\n\n"
    return title, ("contraction, operands, accumulation, by", "relative error", "bias"), rows


def products() -> Described:
    found, rows = json.loads(TUNED.read_text(encoding="utf-8")), []
    by_shape: dict[tuple[int, ...], dict[str, float]] = {}
    for key, done in found["done"].items():
        _, layout, epilogue, _ = key.split(" ")
        times = [t for t in done["microseconds"].values() if not isinstance(t, str)]
        if layout != "tn" and epilogue in ("plain", "forward", "backward", "gated") and times:
            M, N, K = done["shape"]
            flops = 2 * M * N * K * (2 if epilogue == "gated" else 1)
            name = epilogue if epilogue != "plain" else layout
            by_shape.setdefault((M, N, K), {})[name] = flops / min(times) / 1e6
    names = ("nt", "nn", "forward", "backward", "gated")
    for shape, rates in by_shape.items():
        if "forward" in rates:
            rows.append(
                ("×".join(map(str, shape)), *(f"{rates[n]:.0f}" if n in rates else "" for n in names))
            )
    title = (
        f"bf16 products M × N × K, TFLOP/s of the fastest configuration ({_where(found)}). x wᵀ and dy w "
        "alone; with bias, GELU and z written; times GELU's derivative with the bias gradient; two gated by "
        "SiLU:\n\n"
    )
    return title, ("shape", "x wᵀ", "dy w", "with bias, GELU", "with GELU's derivative", "gated"), rows
