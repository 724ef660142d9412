"""Metrics of GLUE's tasks, by torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sibo_triton.finetune.options import InputError


def require_metrics() -> None:
    """Raise an `InputError` where torchmetrics is not installed."""
    try:
        import torchmetrics  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"metrics need {error.name}: pip install 'sibo-triton[finetune]'.") from error


def classification_metrics(evaluated: Any) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation coefficient.

    Args:
        evaluated: `predictions`, the logits [examples, classes], and `label_ids`, int [examples].

    Returns:
        "accuracy", "f1" (with two classes that of the second, as in GLUE; else the mean over classes) and "mcc".
    """
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef as mcc

    logits, labels = _logits(evaluated), torch.as_tensor(evaluated.label_ids)
    classes, predicted = logits.shape[-1], logits.argmax(dim=-1)
    if classes == 2:
        f1 = binary_f1_score(predicted, labels)
    else:
        f1 = multiclass_f1_score(predicted, labels, num_classes=classes, average="macro")
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        "f1": f1.item(),
        "mcc": mcc(predicted, labels, num_classes=classes).item(),
    }


def regression_metrics(evaluated: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation; NaN where all predictions, or all labels, are equal.

    Args:
        evaluated: `predictions`, float [examples, 1], and `label_ids`, float [examples].

    Returns:
        "pearson" and "spearman".
    """
    from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

    predicted = _logits(evaluated).double().reshape(-1)
    labels = torch.as_tensor(evaluated.label_ids).double().reshape(-1)
    if len(labels.unique()) < 2 or len(predicted.unique()) < 2:
        return {"pearson": float("nan"), "spearman": float("nan")}
    return {
        "pearson": pearson_corrcoef(predicted, labels).item(),
        "spearman": spearman_corrcoef(predicted, labels).item(),
    }


def _logits(evaluated: Any) -> Tensor:
    predictions = evaluated.predictions
    return torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)
