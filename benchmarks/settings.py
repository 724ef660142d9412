"""The settings of adapters, the same for all providers of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIXING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # they have the hidden state's width, like h0


@dataclass(frozen=True)
class Linears:
    """The linears of a layer that can get adapters, by the ends of their names.

    Attributes:
        all: in the order of the forward.
        mixing: those that read the residual stream.
        groups: siblings, which share x, in one group; each of the others in its own.
        feed_forward: those of `mixing` that are in the feed-forward network.
    """

    all: tuple[str, ...] = ALL_LINEARS
    mixing: tuple[str, ...] = MIXING
    groups: tuple[tuple[str, ...], ...] = (
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    )
    feed_forward: tuple[str, ...] = ("gate_proj", "up_proj")


@dataclass(frozen=True, kw_only=True)
class AdapterSetting:
    """The settings common to all kinds of adapters.

    Attributes:
        fp32_adapters: whether their weights are float32, PEFT's default, or have the frozen model's dtype.
        dropout: its rate.
        lambda_: the share of h0, for providers that mix.
        linears: of the layer.
    """

    fp32_adapters: bool
    dropout: float
    lambda_: float = 0.1
    linears: Linears = Linears()

    def __str__(self) -> str:
        return f"{'fp32' if self.fp32_adapters else 'bf16'} adapters, dropout {self.dropout:g}"

    def describe(self) -> dict[str, Any]:
        """The settings, for a file of results."""
        return {
            "adapters": "float32" if self.fp32_adapters else "bfloat16",
            "dropout": self.dropout,
            "lambda": self.lambda_,
        }

    @property
    def size(self) -> str:
        """The size of an adapter, for titles."""
        raise NotImplementedError

    @property
    def targets(self) -> tuple[str, ...]:
        """Which of the linears get an adapter."""
        raise NotImplementedError

    @property
    def mixing(self) -> tuple[str, ...]:
        """Which of those mix, for providers that mix."""
        raise NotImplementedError

    def parameters(self, K: int, N: int) -> int:
        """The number of parameters of the adapter on a linear from K to N."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Setting(AdapterSetting):
    """LoRA, on all linears.

    Attributes:
        rank: r.
    """

    rank: int = 16

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank, **super().describe()}

    @property
    def size(self) -> str:
        return f"r={self.rank}"

    @property
    def targets(self) -> tuple[str, ...]:
        return self.linears.all

    @property
    def mixing(self) -> tuple[str, ...]:
        return self.linears.mixing

    def parameters(self, K: int, N: int) -> int:
        return self.rank * (K + N)


@dataclass(frozen=True, kw_only=True)
class BottleneckSetting(AdapterSetting):
    """Bottleneck adapters on the linears that read the feed-forward network's input; the authors' sizes by default.

    Attributes:
        bottleneck_size: width of the bottleneck.
        activation: in it.
        placement: "series", in front of the linear, or "parallel".
        biases: whether both projections have a bias; the authors' have none.
        scaling: s.
    """

    bottleneck_size: int = 256
    activation: str = "tanh"
    placement: str = "series"
    biases: bool = False
    scaling: float = 1.0

    def __str__(self) -> str:
        return f"{self.placement}{' with biases' if self.biases else ''}, {super().__str__()}"

    def describe(self) -> dict[str, Any]:
        names = ("bottleneck_size", "activation", "placement", "biases")
        return {name: getattr(self, name) for name in names} | super().describe()

    @property
    def size(self) -> str:
        return f"bottleneck {self.bottleneck_size}"

    @property
    def targets(self) -> tuple[str, ...]:
        return self.linears.feed_forward

    @property
    def mixing(self) -> tuple[str, ...]:
        return self.linears.feed_forward

    def parameters(self, K: int, N: int) -> int:
        written = K if self.placement == "series" else N
        return self.bottleneck_size * (K + written) + self.biases * (self.bottleneck_size + written)


BF16 = Setting(fp32_adapters=False, dropout=0.0)
DEFAULTS = Setting(fp32_adapters=True, dropout=0.05)  # PEFT's dtype, and a usual rate
#: Bottleneck adapters, in series and in parallel, with both.
ADAPTERS = tuple(
    BottleneckSetting(fp32_adapters=lora.fp32_adapters, dropout=lora.dropout, placement=placement, biases=biases)
    for placement, biases in (("series", False), ("parallel", True))
    for lora in (BF16, DEFAULTS)
)


def least_moved(
    setting: AdapterSetting, shapes: Mapping[str, tuple[int, int]], tokens: int, mixes: bool
) -> tuple[int, int]:
    """Bytes that adapters must read and write beyond the frozen linears in bfloat16: every input and output once.

    Each linear separately, as one operation forward and one backward: the adapter's weights and h0 in both; x in the
    backward, where the frozen linear does not read it; the weights' gradients. What the frozen linear moves anyway (x,
    y, dY, dX) does not count.

    Args:
        setting: of the adapters.
        shapes: (K, N) of linears; those without an adapter do not count.
        tokens: the number of tokens.
        mixes: whether h0 is read.
    """
    read = written = 0
    for name, (K, N) in shapes.items():
        if name in setting.targets:
            adapter = setting.parameters(K, N) * (4 if setting.fp32_adapters else 2)
            h0 = 2 * tokens * K if mixes and name in setting.mixing else 0
            read += 2 * (adapter + h0) + 2 * tokens * K
            written += adapter
    return read, written
