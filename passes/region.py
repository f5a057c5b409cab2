"""What travels through the pipeline: one captured graph, what was asked for, and what has been done to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusekit.kernels.recipe import Recipe
from fusekit.passes.config import Config
from fusekit.passes.delayed import ModelScales
from fusekit.passes.inputs import InputCast, InputOperand, InputScales
from fusekit.passes.weights import WeightCache


@dataclass(frozen=True, kw_only=True)
class Levels:
    """A recipe for each layer: precision="auto".

    tokens: by the layer's name; None is bf16. default: of layers that are not named here.
    reasons: by the layer's name, for reports; why: of the others.
    watched: layers in bf16 keep a site of their own, so that their inputs and gradients can be sampled.
    """

    tokens: Mapping[str, str | None] = field(default_factory=dict)
    default: str | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    why: str = "precision auto: not sampled yet"
    watched: bool = True

    def token(self, layer: str) -> str | None:
        return self.tokens.get(layer, self.default)

    def reason(self, layer: str) -> str:
        return self.reasons.get(layer, self.why)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked of `optimize`, checked.

    precision: "keep", "tf32", "fp16", "bf16", "fp8".
    recipe: of "fp8"; None for the others.
    levels: what each layer has instead of `recipe`; None: all have that.
    keep: patterns of module names that a recipe leaves in high precision.
    modules: names of the model's modules by str(id(module)), under which graph nodes carry them.
    fuse: names of the ops that may be used, None for all.
    remainder: "auto", "eager", "inductor".
    strict: raise where a matmul, attention or norm stays unfused.
    keep_logits: False promises that only the loss is read.
    deterministic: False allows gradients whose bits differ between two runs.
    scales: of a recipe with delayed scales.
    """

    precision: str = "keep"
    recipe: Recipe | None = None
    levels: Levels | None = None
    keep: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    fuse: frozenset[str] | None = None
    remainder: str = "auto"
    strict: bool = False
    keep_logits: bool = True
    deterministic: bool = True
    scales: ModelScales | None = field(default=None, repr=False, compare=False)


@dataclass(kw_only=True)
class Fusion:
    """One rewritten site.

    site: stable name in its graph, "linear_act_3"; the same whichever other sites are disabled.
    eager: GraphModule with the signature and the results of the fused node, made of the replaced nodes.
    inputs: one per placeholder of `eager`. The fused node's tensor arguments come first, in order, as None;
        then the names of the graph inputs the replaced nodes read beside them. A mask that was recognised as
        structure is such a case: the fused op does not take it, `eager` computes it as the model did, so
        `verify` compares with the mask the model had and a wrong recognition is caught.
    layer: the module's name, where `Settings.levels` chose how it runs.
    module: the name of the innermost module around it, "" where none is known.
    gains are ratios of eager time to fused time; None until estimated or measured.
    """

    site: str
    op: str
    rule: str
    location: str
    shapes: tuple[tuple[int | str, ...], ...]
    dtype: str
    implementation: str = ""
    estimated_gain: float | None = None
    measured_gain: float | None = None
    bytes_saved: int = 0
    flops: int = 0
    eager: fx.GraphModule | None = field(default=None, repr=False)
    inputs: tuple[str | None, ...] = ()
    layer: str = ""
    module: str = ""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One site that was looked at and left alone, and why.

    layer: the layer whose reason is that of `Settings.levels`, which changes while a plan is made.
    """

    op: str
    location: str
    reason: str
    rule: str = ""
    layer: str = ""


@dataclass(kw_only=True)
class Region:
    """One captured graph on its way through the pipeline; passes change it in place."""

    module: fx.GraphModule
    settings: Settings
    config: Config
    index: int = 0
    training: bool = True
    in_frame: bool = True  # built while Dynamo compiles the frame, so that guards on sizes still take effect
    disabled_sites: frozenset[str] = frozenset()
    fusions: list[Fusion] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)  # that FP8 could take: (N, K) by name
    layer_weights: dict[str, list[str]] = field(default_factory=dict)  # of one name, by graph input
    input_casts: list[InputCast | InputOperand | InputScales] = field(default_factory=list)
    weights: WeightCache = field(default_factory=WeightCache)
    unread: tuple[int, ...] = ()  # outputs the caller promised not to read: None in the graph
    notes: list[str] = field(default_factory=list)
    run: Callable[..., Any] | None = None

    def refuse(self, op: str, location: str, reason: str, rule: str = "", layer: str = "") -> None:
        self.refusals.append(Refusal(op=op, location=location, reason=reason, rule=rule, layer=layer))
