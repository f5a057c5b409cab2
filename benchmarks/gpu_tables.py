"""Tables of what was measured on a GPU: training steps, attention, FP8 layers, matrix products.

Files: gpu_h100.json, attention_tiles_h100.json and fp8_layers_h100.json of benchmarks/results, and the tuned
table of the device.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.results_file import CHECKOUT, RESULTS
from fusekit.kernels.attention_launch import CONFIGS, CONFIGS_SM90

Rows = list[tuple[Any, ...]]
Described = tuple[str, tuple[str, ...], Rows]  # title, headings, rows
TUNED = CHECKOUT / "kernels" / "configs" / "nvidia_h100_80gb_hbm3.json"
DIRECTIONS = ("forward", "forward+backward")
SWEPT = ("D", "T", "causal", "kernel", "cfg")


def _load(name: str) -> Any:
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
    sweep = _load("attention_tiles_h100.json")
    for a in found["attention"]:
        flash = (f"{a[name]}" if name in a else "" for name in ("flash2_forward", "flash2_backward"))
        sees = "causal" if a["causal"] else "full"
        shape = f"{a['batch']}×{a['heads']}×{a['tokens']:,}×{a['features']}"
        own = (a["own_forward"], a["own_backward"], f"{shipped_backward(a, sweep):.0f}")
        libraries = (a["chosen_forward"], a["cudnn_forward"], a["cudnn_backward"], *flash)
        rows.append((shape, sees, *own, *libraries))
    title = (
        f"Attention in bf16, TFLOP/s ({_where(found)}). The forward pass is cuDNN's where it was chosen; "
        "the backward pass is always the own, because two runs of cuDNN's differ in their bits. It was timed "
        "as a whole with tiles for dk and dv that spill a few registers, which no longer ship; what ships is "
        "put together from the times of its kernels in the sweep of tiles:\n\n"
    )
    headings = (
        "batch × heads × tokens × features", "", "own forward", "own backward", "of what ships",
        "chosen forward", "cuDNN forward", "cuDNN backward", "flash 2 forward", "flash 2 backward",
    )  # fmt: skip
    return title, headings, rows


def shipped_backward(shape: dict[str, Any], sweep: list[dict[str, Any]]) -> float:
    """TFLOP/s of the backward pass, of 2.5 forward passes, from the sweep's rates of its two kernels, which
    compute 1.5 and 2 forward passes."""
    seconds = 0.0
    for kernel, share in (("grad_query", 1.5), ("grad_key_value", 2.0)):
        features = shape["features"]
        tile = CONFIGS_SM90.get((kernel, features), CONFIGS[kernel][features][0])
        wanted = (features, shape["tokens"], shape["causal"], kernel, list(tile))
        rate = next(r["tflops"] for r in sweep if tuple(r.get(name) for name in SWEPT) == wanted)
        seconds += share / rate
    return 2.5 / seconds


def host() -> Described:
    found = _load("gpu_h100.json")
    rows = [(f"`{h['op']}`", f"{h['forward_us']}", f"{h['backward_us']}") for h in found["host"]]
    title = f"What handing an op to the GPU takes the host, in µs of one thread ({_where(found)}):\n\n"
    return title, ("op", "forward", "backward"), rows


def loss() -> Described:
    found = _load("gpu_h100.json")
    shape = found["loss"]
    title = (
        f"`linear_cross_entropy` of {shape['shape'].replace('x', '×')} (tokens, classes, features) within a "
        f"training step of GPT-2 124M, all of its kernels, in ms ({_where(found)}; the first at commit "
        "0067544):\n\n"
    )
    rows = [
        (
            "rows of logits as the vocabulary has them, chunks of 512",
            f"{shape['unaligned_chunks_of_512_ms']}",
        ),
        ("rows aligned, chunks of 2048", f"{shape['aligned_chunks_of_2048_ms']}"),
    ]
    return title, ("", "ms"), rows


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
