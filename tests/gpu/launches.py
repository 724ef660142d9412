"""What the GPU tests launch; `make gpu` compiles all of it first. In the interpreter: small sizes and fewer cases."""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from gradient_launches import InputGradient, UpBackward, WeightGradient
from kernel_launches import Activated, Down, Launch, LowRank, Up

from sibo_triton.kernels.precision import INTERPRETED
from sibo_triton.reference import ACTIVATIONS

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
RANKS = (1, 3, 4, 8, 16, 24, 48, 64, 128, 200) if INTERPRETED else (1, 3, 8, 16, 24, 64, 128, 200, 512)
DTYPES = ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, FP32))  # of activations and adapter
SHAPES = ((65, 130), (64, 128), (7, 257), (130, 63), (1, 1))
LAYOUTS = ("contiguous", "padded", "transposed", "expanded")
RATES = (0.0, 0.05, 0.5)


def pairwise(*factors: Sequence) -> list[tuple]:
    """Rows with a value of each factor, in which every two values of two factors meet: few, not the fewest."""
    places = range(len(factors))
    missing = {
        (i, j, a, b)
        for i, j in combinations(places, 2)
        for a, b in product(range(len(factors[i])), range(len(factors[j])))
    }
    rows = []
    while missing:
        row: dict[int, int] = {}
        i, j, a, b = min(missing)
        row |= {i: a, j: b}
        for k in (k for k in places if k not in row):
            values = range(len(factors[k]))
            met = [sum(_pair(k, value, other, row[other]) in missing for other in row) for value in values]
            # of equals another one in every row
            row[k] = max(values, key=lambda value: (met[value], (value + len(rows)) % len(values)))
        missing -= {_pair(k, row[k], other, row[other]) for k, other in combinations(places, 2)}
        rows.append(tuple(factors[k][row[k]] for k in places))
    return rows


def _pair(i: int, a: int, j: int, b: int) -> tuple[int, int, int, int]:
    return (i, j, a, b) if i < j else (j, i, b, a)


def _values() -> list[Launch]:
    """Of each kernel, shapes, dtypes, ranks, strides and options, of which every two meet; and what is special."""
    launches: list[Launch] = []
    switch = (False, True)
    rows = pairwise(RANKS, DTYPES, SHAPES, LAYOUTS, RATES, switch, switch, switch)
    for n, (rank, (x, adapter), (m, k), layout, p, mixes, is_tensor, third) in enumerate(rows):
        lambda_ = 0.3 if mixes else 0.0
        common = {"lambda_is_tensor": is_tensor, "strides": layout}
        launches += [
            Down(m, k, (rank,), x, adapter, lambda_, p, third, **common),
            Up(m, k, rank, x, adapter, mixes, third, scaling_is_tensor=is_tensor, strides=layout),
            UpBackward(m, k, (rank,), x, adapter, scaling_is_tensor=is_tensor, strides=layout),
            WeightGradient(m, k, (rank,), x, adapter, lambda_, p, **common),
            InputGradient(m, k, (rank,), x, adapter, 0.3, p, third, mixes, is_tensor, LAYOUTS[n % 3]),
        ]
    # Dtypes that meet in no usual model, siblings that share a launch, few rows that are cut along K.
    launches += [
        Down(65, 130, (24,), BF16, BF16, 0.3, 0.1, h0_dtype=FP32),
        Down(65, 130, (16,), FP32, BF16, 0.7, h0_dtype=FP16, difference=True),
        Down(65, 130, (3, 130, 16), BF16, FP32, 0.3, 0.1, difference=True, lambda_is_tensor=True),
        Down(130, 257, (16, 16, 16), BF16, BF16, 0.3, 0.1),
        Down(5, 1000, (16,), BF16, BF16, 0.3, 0.1, lambda_is_tensor=True),
        Up(65, 130, 24, FP32, BF16, has_bias=True),
        Up(65, 130, 24, BF16, FP16, adds=True),
        UpBackward(65, 130, (16,), FP32, BF16),
        UpBackward(65, 130, (24,), FP16, BF16, (True, False)),
        UpBackward(65, 130, (24,), BF16, FP16, (False, True)),
        WeightGradient(65, 130, (24,), FP16, BF16, 0.3, 0.1, h0_dtype=FP32),
        InputGradient(65, 130, (24,), FP16, BF16, 0.3, 0.1, wants_dh=True),
    ]
    # Siblings of few rows, whose K is cut, and of many.
    launches += [
        LowRank(5, 1000, 257, (16, 3, 40), BF16, BF16, 0.3, lambda_is_tensor=True),
        LowRank(1, 1000, 130, (16, 16, 16), BF16, FP32, 0.3, 0.1, has_bias=True, scaling_is_tensor=True),
        LowRank(16, 500, 130, (24, 130), FP16, FP16, 0.0, has_bias=True),
        LowRank(130, 257, 130, (8, 16), FP32, FP32, 0.3),
    ]
    # Bottleneck adapters: every activation, of many rows and of few.
    for n, activation in enumerate(ACTIVATIONS):
        x, adapter = DTYPES[n % len(DTYPES)]
        rest = {"wants_sum": True, "activation": activation, "scaling_is_tensor": n % 2 == 0}
        launches += [
            Activated(130, 257, (64, 24), x, adapter, activation, 0.3, RATES[n % len(RATES)]),
            Activated(
                5, 1000, (24,), x, adapter, activation, 0.3 * (n % 2), has_bias=n % 2 == 0, difference=n % 3 == 1
            ),
            UpBackward(130, 256, (64 if n % 2 else 16,), x, adapter, **rest),
        ]
    # Gradients of siblings: few columns in one tile, a tile for each, several kinds.
    for ranks, x, adapter, p in (
        ((16, 16, 16), BF16, BF16, 0.0),
        ((3, 16, 24), BF16, FP32, 0.0),
        ((16, 8), FP16, FP32, 0.1),
        ((16, 130, 64), FP16, FP16, 0.0),
        ((24, 8, 16), FP32, FP32, 0.1),
    ):
        rest = {"lambda_is_tensor": p == 0, "last_is_plain": len(ranks) == 3}
        launches += [
            UpBackward(130, 257, ranks, x, adapter, grad_dtype=adapter),
            WeightGradient(130, 257, ranks, x, adapter, 0.3, p, grad_dtype=adapter, **rest),
            InputGradient(130, 257, ranks, x, adapter, 0.3, p, **rest),
            InputGradient(130, 257, ranks, x, adapter, 0.3, p, wants_dh=True, **rest),
        ]
    return launches


VALUES = _values()

TOKENS, WIDTH = (130, 200) if INTERPRETED else (2**16, 1024)
LARGE: list[Launch] = [
    launch
    for x, adapter, rank in ((BF16, BF16, 16), (BF16, FP32, 16), (FP16, FP16, 128), (FP32, FP32, 64))
    for launch in (
        Down(TOKENS, WIDTH, (rank,) * 3, x, adapter, 0.3, 0.1, difference=rank == 16, lambda_is_tensor=True),
        Up(TOKENS, WIDTH, rank, x, adapter, adds=True),
        UpBackward(TOKENS, WIDTH, (rank,), x, adapter),
        WeightGradient(TOKENS, WIDTH, (rank,), x, adapter, 0.3, 0.1, lambda_is_tensor=True),
        InputGradient(TOKENS, WIDTH, (rank,), x, adapter, 0.3, 0.1, adds=True, lambda_is_tensor=True),
        UpBackward(TOKENS, WIDTH, (rank,) * 3, x, adapter, grad_dtype=adapter),
        WeightGradient(TOKENS, WIDTH, (rank,) * 3, x, adapter, 0.3, lambda_is_tensor=True, grad_dtype=adapter),
        InputGradient(TOKENS, WIDTH, (rank,) * 3, x, adapter, 0.3, 0.1, lambda_is_tensor=True),
        Activated(TOKENS, WIDTH, (256,), x, adapter, "tanh", 0.3, 0.1),
        UpBackward(TOKENS, WIDTH, (256,), x, adapter, wants_sum=True, activation="tanh"),
    )
]

#: Elements whose offsets pass 2^31: of what is read, and of what is added to.
FAR: list[Launch] = [
    Down(3, 24, (16,), FP16, FP16, 0.5, strides="far"),
    Up(3, 3, 24, FP16, FP16, adds=True, strides="far"),
    UpBackward(3, 24, (5,), FP16, FP16, strides="far"),
    UpBackward(3, 24, (128,), FP16, FP16, strides="far"),  # in two passes
    WeightGradient(3, 24, (16,), FP16, FP16, 0.5, strides="far"),
    InputGradient(3, 24, (16,), FP16, FP16, 0.5, adds=True, strides="far"),
]
#: The same of a fresh y, by its size.
FAR_Y = Up(130, 200, 16, BF16, BF16) if INTERPRETED else Up(2**16 + 128, 2**15, 16, BF16, BF16)

#: Of each kernel one launch with sums in parts; for repeated runs, graphs, other devices and the sanitizer.
ROWS = 130 if INTERPRETED else 300
SMALL: list[Launch] = [
    Down(5, 1000, (16, 8), BF16, BF16, 0.3, 0.1, difference=True, lambda_is_tensor=True),
    Down(65, 130, (128,), BF16, FP32, 0.3, 0.1, lambda_is_tensor=True),
    Up(65, 130, 16, BF16, FP32, adds=True, has_bias=True, scaling_is_tensor=True),
    LowRank(5, 1000, 130, (16, 8), BF16, BF16, 0.3, 0.1, has_bias=True, lambda_is_tensor=True),
    UpBackward(ROWS, 130, (16,), BF16, BF16, scaling_is_tensor=True),
    UpBackward(ROWS, 130, (64,), BF16, FP32),
    WeightGradient(ROWS, 130, (16,), BF16, FP32, 0.3, 0.1, lambda_is_tensor=True),
    InputGradient(65, 130, (16,), BF16, FP32, 0.3, 0.1, adds=True, lambda_is_tensor=True),
    Activated(5, 1000, (24,), BF16, BF16, "gelu", 0.3, 0.1),
    UpBackward(ROWS, 130, (16,), BF16, BF16, wants_sum=True, activation="silu"),
    UpBackward(ROWS, 130, (16, 8), BF16, BF16, grad_dtype=BF16),
    WeightGradient(ROWS, 130, (16, 8, 16), BF16, BF16, 0.3, lambda_is_tensor=True, grad_dtype=BF16),
    InputGradient(65, 130, (16, 8, 16), BF16, FP32, 0.3, 0.1, wants_dh=True, lambda_is_tensor=True),
]

#: A is the identity: t shows the mask. The seed is drawn anew in each replay of a graph.
MASK = Down(130, 64, (64,), FP32, FP32, lambda_=0.0, p=0.5)

ALL: list[Launch] = [*VALUES, *LARGE, *FAR, FAR_Y, *SMALL, MASK]
