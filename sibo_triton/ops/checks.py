"""What the operations check of the arguments that LoRA and bottleneck adapters share."""

from __future__ import annotations

from torch import Tensor


def check_mixing(initial_residual: Tensor | None, lambda_: float | Tensor) -> None:
    """Raise a ValueError unless lambda is in its range, and h0 is there where it is read."""
    is_tensor = isinstance(lambda_, Tensor)
    if not is_tensor and not 0 <= lambda_ <= 1:
        raise ValueError(f"lambda_ is {lambda_}: it must lie in [0, 1]; 0 is the plain method")
    if initial_residual is None and (is_tensor or lambda_ != 0):
        raise ValueError(f"initial_residual is None, but lambda_ is {lambda_}: pass h0, or lambda_=0.0 for no mixing")


def check_same_tokens(x: Tensor, initial_residual: Tensor | None) -> None:
    """Raise a ValueError unless h0, where it is given, has the shape of x."""
    if initial_residual is not None and initial_residual.shape != x.shape:
        raise ValueError(
            f"initial_residual has shape {list(initial_residual.shape)} and x {list(x.shape)}: h0 must belong to the "
            "same tokens and have the same width as x; pass lambda_=0.0 where it cannot"
        )


def check_dropout(dropout_p: float, dropout_seed: Tensor | None) -> None:
    """Raise a ValueError unless the rate lies in [0, 1), and comes with a seed where it is not 0."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: it must lie in [0, 1); 0.0 turns dropout off")
    if dropout_p != 0 and dropout_seed is None:
        raise ValueError(f"dropout_p is {dropout_p}, but no seed was given: pass draw_seed(x.device), or dropout_p=0.0")
