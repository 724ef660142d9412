"""SIBO in plain PyTorch: the definition, what runs where no kernel does, and the oracle that the kernels are tested on.

The equations (Wen, Zhang, Fang: "SIBO: A Simple Booster for Parameter-Efficient Fine-Tuning", Findings of ACL 2024) are
in ``docs/definition.md`` with their gradients; autograd differentiates every function here::

    x~ = (1 - lambda) x + lambda h0                                     mix
    y  = W0 x + b + s B A drop(x~)                                      lora_linear: add_lora, of down and up
    y  = W0 (x + s W_up f(W_down drop(x~))) + b   and two other forms   bottleneck_adapter

Names in shapes: ``...`` any leading dimensions (M tokens in all), K in_features, N out_features, r the rank. Floating
point tensors may be float16, bfloat16, float32 or float64, on any one device.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


def mix(x: Tensor, initial_residual: Tensor | None, lambda_: float | Tensor) -> Tensor:
    """``x~ = (1 - lambda) x + lambda h0``: the adapter's input, mixed with the initial residual.

    Computed in the widest of the two dtypes and float32, and rounded once, to ``x.dtype``. Nothing is skipped at
    lambda = 1, nor when a tensor holds 0: what is not finite in either input is not finite in ``x~``, as 0 * inf = nan.

    Args:
        x: the layer's input, ``[..., K]``.
        initial_residual: h0, of the shape of ``x`` and of any floating dtype. Not looked at when ``lambda_`` is the
            number 0, and may then be None.
        lambda_: a number in [0, 1], or a floating point tensor with one element (its value is not checked, which would
            make a GPU wait). Gradients flow to such a tensor, to ``x`` and to ``initial_residual``.

    Returns:
        ``x`` itself when ``lambda_`` is the number 0, else a new tensor of its shape and dtype.

    Raises:
        TypeError: ``lambda_`` is neither a number nor a tensor, or an input is not floating point.
        ValueError: ``lambda_`` is NaN, outside [0, 1], or a tensor that is not one floating point value; h0 is missing
            or of another shape.
    """
    lambda_ = _checked_lambda(lambda_)
    if not isinstance(lambda_, Tensor) and lambda_ == 0:
        return x
    if initial_residual is None:
        raise ValueError(f"initial_residual is None, but lambda_ is {lambda_}: pass h0, or lambda_=0.0 for no mixing")
    if initial_residual.shape != x.shape:
        raise ValueError(
            f"initial_residual has shape {list(initial_residual.shape)} and x {list(x.shape)}: h0 must belong to the "
            "same tokens and have the same width as x; pass lambda_=0.0 where it cannot"
        )
    if not (x.is_floating_point() and initial_residual.is_floating_point()):
        raise TypeError(f"x is {x.dtype} and initial_residual {initial_residual.dtype}: both must be floating point")
    dtype = torch.promote_types(torch.promote_types(x.dtype, initial_residual.dtype), torch.float32)
    if isinstance(lambda_, Tensor):
        lambda_ = lambda_.reshape(()).to(dtype)
    return ((1 - lambda_) * x.to(dtype) + lambda_ * initial_residual.to(dtype)).to(x.dtype)


def down(
    x: Tensor,
    lora_a: Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """``t = drop(x~) A^T``: the mixed input, projected to the rank.

    Args:
        x: ``[..., K]``; cast to ``lora_a.dtype`` first, as PEFT does, so that float32 adapters on a 16-bit model mix
            and project in float32.
        lora_a: A, ``[r, K]``.
        initial_residual, lambda_: see :func:`mix`.
        dropout_p, dropout_seed: see :func:`dropout`.

    Returns:
        t, ``[..., r]``, in ``lora_a.dtype``.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, and for a shape that does not fit.
    """
    check_shape("lora_a", lora_a, ("r", x.shape[-1]))
    x_mixed = mix(x.to(lora_a.dtype), initial_residual, lambda_)
    return F.linear(dropout(x_mixed, dropout_p, dropout_seed), lora_a)


def up(t: Tensor, lora_b: Tensor, scaling: float | Tensor, lora_bias: Tensor | None = None) -> Tensor:
    """``s (t B^T + b_B)``: the low-rank product of the adapter, with B's own bias if it has one.

    Args:
        t: ``[..., r]``; cast to ``lora_b.dtype``.
        lora_b: B, ``[N, r]``.
        scaling: s, ``alpha / r`` or ``alpha / sqrt(r)``; a number or a tensor with one element.
        lora_bias: b_B, ``[N]``, cast likewise, or None; PEFT's option of that name.

    Returns:
        ``[..., N]``, in ``lora_b.dtype``; wider if ``scaling`` is a wider tensor of shape [1].

    Raises:
        ValueError: ``lora_b`` is not ``[N, r]``, or ``lora_bias`` not ``[N]``.
    """
    check_shape("lora_b", lora_b, ("N", t.shape[-1]))
    if lora_bias is not None:
        check_shape("lora_bias", lora_bias, lora_b.shape[:1])
        lora_bias = lora_bias.to(lora_b.dtype)
    return F.linear(t.to(lora_b.dtype), lora_b, lora_bias) * scaling


def add_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """``y = base + s (B A drop(x~) + b_B)``: SIBO-LoRA on what a frozen layer of any kind returned for the unmixed x.

    The adapter computes in its own dtypes (:func:`down`, :func:`up`); the sum is taken in the wider one and rounded
    once, to that of ``base``.

    Args:
        base: ``[..., N]``.
        x: ``[..., K]``; the other arguments are those of :func:`down` and :func:`up`. Pass ``dropout_p=0.0`` outside
            of training.

    Returns:
        y, ``[..., N]``, in ``base.dtype``.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, and for a shape that does not fit.
    """
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base has shape {list(base.shape)} and x {list(x.shape)}: both must hold the same tokens")
    check_shape("lora_b", lora_b, (base.shape[-1], lora_a.shape[0]))
    t = down(x, lora_a, initial_residual, lambda_, dropout_p, dropout_seed)
    return (base + up(t, lora_b, scaling, lora_bias)).to(base.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """``y = W0 x + b + s (B A drop(x~) + b_B)``: a linear layer with SIBO-LoRA; lambda = 0 is plain LoRA.

    The frozen path reads the unmixed ``x``, in its own dtype; :func:`add_lora` adds the rest.

    Args:
        x: ``[..., K]``.
        weight, bias: W0, ``[N, K]``, and b, ``[N]`` or None, in ``x.dtype``.
        lora_a, lora_b: A, ``[r, K]``, and B, ``[N, r]``.
        scaling, lora_bias: see :func:`up`.
        initial_residual, lambda_: see :func:`mix`.
        dropout_p, dropout_seed: see :func:`dropout`. Pass ``dropout_p=0.0`` outside of training.

    Returns:
        y, ``[..., N]``, in the frozen path's dtype.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, and for a shape that does not fit.
    """
    check_shape("weight", weight, ("N", x.shape[-1]))
    base = F.linear(x, weight, bias)
    return add_lora(base, x, lora_a, lora_b, scaling, initial_residual, lambda_, dropout_p, dropout_seed, lora_bias)


#: The activations f of :func:`bottleneck_adapter`, by the names that transformers gives them.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
)


def bottleneck_adapter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    placement: str = "series",
    side: str = "input",
    activation: str = "tanh",
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer with a SIBO bottleneck adapter; lambda = 0 is the plain adapter.

    With the branch ``g(v) = s (W_up f(W_down drop(v~) + b_down) + b_up)``, where v~ is v mixed with h0::

        series, side "input"    y = W0 (x + g(x)) + b
        series, side "output"   y = z + g(z),  z = W0 x + b
        parallel                y = W0 x + b + g(x)

    The skip is the unmixed x (or z), as in the authors' code. The branch computes in ``down_weight.dtype``; each sum
    is taken in the wider dtype and rounded once, to that of x (or z).

    Args:
        x: ``[..., K]``.
        weight, bias: W0, ``[N, K]``, and b, ``[N]`` or None, in ``x.dtype``.
        down_weight: W_down, ``[bottleneck, K]``; ``[bottleneck, N]`` in series on the output side.
        up_weight: W_up, ``[K, bottleneck]`` in series on the input side, else ``[N, bottleneck]``; in
            ``down_weight.dtype``.
        scaling: s, a number or a tensor with one element (which may be learnable).
        placement: "series" or "parallel".
        side: "input" or "output", in series; a parallel adapter reads the input.
        activation: f, a name in :data:`ACTIVATIONS`.
        down_bias, up_bias: b_down, ``[bottleneck]``, and b_up; or None.
        initial_residual, lambda_: see :func:`mix`; h0 has the shape of what is mixed, z on the output side.
        dropout_p, dropout_seed: see :func:`dropout`.

    Returns:
        y, ``[..., N]``, in ``x.dtype``.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, for a shape that does not fit, and for an unknown
            activation or placement.
    """
    if (placement, side) not in (("series", "input"), ("series", "output"), ("parallel", "input")):
        raise ValueError(
            f"placement={placement!r} with side={side!r} is no adapter: "
            "choose 'series' with side 'input' or 'output', or 'parallel' with side 'input'"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known: choose one of {', '.join(sorted(ACTIVATIONS))}")
    check_shape("weight", weight, ("N", x.shape[-1]))
    out_features, in_features = weight.shape
    read = out_features if side == "output" else in_features
    written = in_features if (placement, side) == ("series", "input") else out_features
    check_shape("down_weight", down_weight, ("bottleneck", read))
    check_shape("up_weight", up_weight, (written, down_weight.shape[0]))

    def add_branch(skip: Tensor, v: Tensor) -> Tensor:
        """``skip + g(v)``."""
        v_mixed = mix(v.to(down_weight.dtype), initial_residual, lambda_)
        hidden = F.linear(dropout(v_mixed, dropout_p, dropout_seed), down_weight, down_bias)
        branch = F.linear(ACTIVATIONS[activation](hidden), up_weight, up_bias) * scaling
        return (skip + branch).to(skip.dtype)

    if placement == "series" and side == "input":
        return F.linear(add_branch(x, x), weight, bias)
    z = F.linear(x, weight, bias)
    return add_branch(z, x if placement == "parallel" else z)


def draw_seed(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A seed for :func:`dropout`, from torch's generator of the device, so that ``torch.manual_seed`` governs it.

    It stays a tensor, so that the host never waits for it. Gradient checkpointing, which restores the generator,
    draws the same one again.

    Args:
        device: where the seed lives; torch's default device if None.
        generator: the generator to draw from, of that device; its default one if None.

    Returns:
        int64, ``[1]``.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """``drop(x) = x * mask / (1 - p')`` with the mask of :func:`dropout_mask`, in which p' is p on its 2^-16 grid.

    The expectation is exactly x. As with ``torch.nn.functional.dropout``, what is not finite stays so where it is
    dropped (nan * 0 = nan): a mask does not hide an overflow.

    Args:
        x: ``[..., K]``; token m of the mask is row m of ``x.reshape(-1, K)``.
        p: the probability of dropping an element, in [0, 1). 0 returns ``x`` itself.
        seed: from :func:`draw_seed`, or an int; needed when p > 0.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: p is not a number, or the seed neither an int nor a tensor.
        ValueError: p is outside [0, 1), or the seed is missing, or a tensor that is not one int64 value.
    """
    threshold = dropout_threshold(p)
    if p == 0:
        return x
    if seed is None:
        raise ValueError(f"dropout_p is {p}, but no seed was given: pass draw_seed(x.device), or dropout_p=0.0")
    mask = dropout_mask(math.prod(x.shape[:-1]), x.shape[-1], p, seed, device=x.device).reshape(x.shape)
    # In this order autograd keeps the mask alone, at one byte an element.
    return x * mask / (1 - threshold / 2**16)


def dropout_mask(
    rows: int,
    cols: int,
    p: float,
    seed: int | Tensor,
    *,
    row_offset: int = 0,
    col_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of ``drop``: True where an element is kept. A pure function of (seed, row, column).

    Any tile of a mask, asked for by its offsets, equals that slice of the whole. One 32-bit word decides two
    neighbouring elements: columns 2j and 2j + 1 are kept when the low and the high half of the word, as signed 16-bit
    integers, are at least ``T - 2^15``, with ``T = min(floor(65536 p + 1/2), 65535)``. In arithmetic modulo 2^32::

        row1, row2 = line_hash(m, row keys)     col1, col2 = line_hash(j, column keys)
        word = (row1 | 1) * col2 + row2;  word ^= word >> 15;  word *= col1 | 1

    ``docs/definition.md`` says why. The seed is the key of both hashes and never meets a counter by itself, so that
    the masks of two seeds are not rearrangements of each other.

    Args:
        rows, cols: the shape of the tile.
        p: the probability of dropping an element, in [0, 1); see T for how it is rounded.
        seed: 64 bits: an int64 tensor with one element, or an int (taken modulo 2^64).
        row_offset, col_offset: where the tile begins, in [0, 2^63).
        device: of the mask; the seed's if None.

    Returns:
        bool, ``[rows, cols]``.

    Raises:
        TypeError, ValueError: as :func:`dropout`; ValueError for a negative size or offset.
    """
    threshold = dropout_threshold(p)
    if min(rows, cols, row_offset, col_offset) < 0:
        raise ValueError(f"negative size or offset: {rows=}, {cols=}, {row_offset=}, {col_offset=}")
    seed = checked_seed(seed, device)
    row_keys, col_keys = hash_keys(seed)
    first_word, odd = divmod(col_offset, 2)
    words = (odd + cols + 1) // 2
    row1, row2 = line_hash(row_offset + torch.arange(rows, device=seed.device).view(rows, 1), *row_keys)  # [rows, 1]
    col1, col2 = line_hash(first_word + torch.arange(words, device=seed.device), *col_keys)  # [words]
    word = (row1 | 1) * col2  # [rows, words]; in place from here: this is where the time goes
    word += row2
    word ^= _shift_right(word, 15)
    word *= col1 | 1
    # The view has the low half first on the (little-endian) machines that torch supports.
    return word.view(torch.int16).narrow(1, odd, cols) >= threshold - 2**15


def line_hash(index: Tensor, key1: Tensor, key2: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 hashes of each 64-bit index, a row's or a column pair's. Among 2^32 neighbours no two are alike."""
    hash1 = _mix32(index.to(torch.int32) ^ key1)  # the cast keeps the low 32 bits
    return hash1, _mix32(hash1 ^ key2 ^ _mix32((index >> 32).to(torch.int32)))


#: Of :func:`hash_keys`: digits of pi, below 2^31.
ROUND_CONSTANTS = (0x243F6A88, 0x05A308D3, 0x13198A2E, 0x03707344, 0x24093822, 0x299F31D0)


def hash_keys(seed: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two row keys and two column keys, int32: a Feistel network, so that either pair is a bijection of the seed."""
    left, right = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    keys = []
    for round_constant in ROUND_CONSTANTS:
        left, right = right, left ^ _mix32(right ^ round_constant)
        keys.append(right)
    return (keys[2], keys[3]), (keys[4], keys[5])


def _mix32(h: Tensor) -> Tensor:
    """A bijection of int32 that spreads every bit over all: Chris Wellons' "lowbias32" (hash-prospector)."""
    h = (h ^ _shift_right(h, 16)) * 0x7FEB352D
    h = (h ^ _shift_right(h, 15)) * (0x846CA68B - 2**32)  # as an int32
    return h ^ _shift_right(h, 16)


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """The logical shift of an int32; torch's is arithmetic."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def _checked_lambda(lambda_: float | Tensor) -> float | Tensor:
    if isinstance(lambda_, Tensor):
        if not lambda_.is_floating_point() or lambda_.numel() != 1:
            found = f"a {lambda_.dtype} tensor of shape {list(lambda_.shape)}"
            raise ValueError(f"lambda_ is {found}: pass one floating point value, of shape [] or [1]")
        return lambda_
    if not isinstance(lambda_, Real) or isinstance(lambda_, bool):
        raise TypeError(f"lambda_ is {lambda_!r}: pass a number in [0, 1] or a tensor with one element")
    if not 0 <= lambda_ <= 1:  # also NaN
        raise ValueError(f"lambda_ is {lambda_}: it must lie in [0, 1]; 0 is the plain method")
    return float(lambda_)


def dropout_threshold(p: float) -> int:
    """T: an element is dropped with probability T / 65536."""
    if not isinstance(p, Real) or isinstance(p, bool):
        raise TypeError(f"dropout_p is {p!r}: pass a number in [0, 1)")
    if not 0 <= p < 1:  # also NaN
        raise ValueError(f"dropout_p is {p}: it must lie in [0, 1); 0.0 turns dropout off")
    return min(math.floor(p * 2**16 + 0.5), 2**16 - 1)


def checked_seed(seed: int | Tensor, device: torch.device | str | None) -> Tensor:
    """The seed as an int64 tensor of shape [], on the device."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise TypeError(f"the dropout seed is {seed!r}: pass an int, or a tensor as draw_seed returns it")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        found = f"a {seed.dtype} tensor of shape {list(seed.shape)}"
        raise ValueError(f"the dropout seed is {found}: pass one int64 value, of shape [] or [1]")
    return seed.reshape(()).to(device=device)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Raise unless the tensor has this shape; a name stands for any size."""
    if len(expected) == tensor.dim():
        for wanted, size in zip(expected, tensor.shape, strict=True):
            if wanted.__class__ is not str and wanted != size:
                break
        else:
            return
    fits = ", ".join(map(str, expected))
    raise ValueError(f"{name} has shape {list(tensor.shape)}, but [{fits}] fits the other arguments")
