"""The initial residual h0: a model's stacks of blocks, the modules that read them, and the forward an h0 belongs to."""

from sibo_triton.initial_residual.binding import InitialResidual
from sibo_triton.initial_residual.hooks import attach, attached, detach
from sibo_triton.initial_residual.stacks import BlockStack, find_block_stacks, stack_of
from sibo_triton.initial_residual.tracing import TrialRun, in_trial_run, trial_run

__all__ = [
    "BlockStack",
    "TrialRun",
    "InitialResidual",
    "attach",
    "attached",
    "detach",
    "find_block_stacks",
    "in_trial_run",
    "stack_of",
    "trial_run",
]
