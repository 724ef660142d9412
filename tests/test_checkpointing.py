"""The initial residual is bound to its own forward: checkpointing of every kind gives the gradients of none."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections import UserDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from checkpoint_kinds import (
    KINDS,
    Enable,
    assert_same,
    checkpoint,
    gradients_of,
    non_reentrant,
    nothing,
    reentrant,
    wrapper,
)
from oracle import oracle_like
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, llama, randomise_adapters
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import SwinConfig, SwinForImageClassification

from sibo_triton import SiboLoraConfig
from sibo_triton.initial_residual import attached
from sibo_triton.initial_residual.needs_gradient import needs_gradient

pytestmark = pytest.mark.oldest

TRAINABLE_EMBEDDINGS = [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": list(range(50))}]


def _model(architecture: str = "llama", **config: object) -> nn.Module:
    torch.manual_seed(3)
    chosen = ARCHITECTURES[architecture]
    options = {"r": 4, "target_modules": list(chosen.targets), "sibo_lambda": 0.4, "lora_dropout": 0.0, **config}
    model = get_peft_model(chosen.build(), SiboLoraConfig(task_type=chosen.task_type, **options))
    randomise_adapters(model)
    return model.train()


def _batches(architecture: str = "llama") -> tuple[dict, dict]:
    torch.manual_seed(4)
    # a wrapper's recompute would write the cache twice, with plain LoRA too
    more = {} if architecture == "bert" else {"use_cache": False}
    return {**ARCHITECTURES[architecture].inputs(), **more}, {**ARCHITECTURES[architecture].inputs(), **more}


def _interleaved(enable: Enable, architecture: str = "llama", between: str | None = None, **config: object) -> dict:
    """Forward A, forward B, backward A, backward B."""
    model = _model(architecture, **config)
    checkpoint(model, enable)
    first, second = _batches(architecture)
    loss_a = model(**first).loss
    if between == "disable_adapter":
        with model.disable_adapter():
            model(**second)
        with torch.no_grad(), model.disable_adapter():
            model(**second)
    loss_b = model(**second).loss
    loss_a.backward()
    # weights that differ, so that exchanging the two would show
    (3 * loss_b).backward()
    return gradients_of(model)


def _one_after_the_other(architecture: str = "llama", **config: object) -> dict:
    """What the interleaved order must give: no checkpointing, each forward followed by its backward."""
    model = _model(architecture, **config)
    first, second = _batches(architecture)
    model(**first).loss.backward()
    (3 * model(**second).loss).backward()
    return gradients_of(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert"])
def test_two_forwards_then_two_backwards(kind: str, architecture: str) -> None:
    expected = _one_after_the_other(architecture)
    assert_same(_interleaved(KINDS[kind], architecture), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_pass_without_adapter_in_between(kind: str) -> None:
    assert_same(_interleaved(KINDS[kind], between="disable_adapter"), _one_after_the_other())


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_learnable_lambda(kind: str) -> None:
    expected = _one_after_the_other(sibo_learnable=True)
    assert any("lora_sibo_lambda" in name and value.abs().max() > 0 for name, value in expected.items())
    assert_same(_interleaved(KINDS[kind], sibo_learnable=True), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", TRAINABLE_EMBEDDINGS)
def test_with_trainable_embeddings(kind: str, config: dict) -> None:
    expected = _one_after_the_other(**config)
    embedding = [name for name in expected if "embed_tokens" in name]
    assert embedding
    assert_same(_interleaved(KINDS[kind], **config), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["block_input", "embedding"])
def test_with_two_sources_side_by_side(kind: str, source: str) -> None:
    def run(enable: Enable, interleave: bool) -> dict:
        model = _model()
        other = "embedding" if source == "block_input" else "block_input"
        targets = list(ARCHITECTURES["llama"].targets)
        model.add_adapter("other", SiboLoraConfig(r=2, target_modules=targets, sibo_source=other, sibo_lambda=0.2))
        torch.manual_seed(5)
        randomise_adapters(model)
        model.base_model.set_adapter(["default", "other"])
        checkpoint(model, enable)
        losses = [model(**batch).loss for batch in _batches()] if interleave else None
        for index, batch in enumerate(_batches()):
            ((1 + 2 * index) * (losses[index] if losses else model(**batch).loss)).backward()
        return gradients_of(model)

    assert_same(run(KINDS[kind], True), run(nothing, False))


def test_dropout_is_replayed() -> None:
    def run(enable: Enable) -> dict:
        model = _model(lora_dropout=0.3)
        enable(model)
        torch.manual_seed(7)
        model(**_batches()[0]).loss.backward()
        return gradients_of(model)

    assert_same(run(non_reentrant), run(nothing))


def test_checkpointing_switched_on_after_a_forward_is_seen() -> None:
    model = _model()
    first, second = _batches()
    model(**first)
    non_reentrant(model)
    loss_a, loss_b = model(**first).loss, model(**second).loss
    loss_a.backward()
    (3 * loss_b).backward()
    assert_same(gradients_of(model), _one_after_the_other())
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model(**first).loss.backward()
    (3 * model(**second).loss).backward()
    assert_same(gradients_of(model), _one_after_the_other())


def test_a_loss_over_two_forwards() -> None:
    """As DPO has it: one backward through two forwards and a reference pass."""

    def run(enable: Enable) -> dict:
        model = _model()
        enable(model)
        first, second = _batches()
        with torch.no_grad(), model.disable_adapter():
            reference = model(**first).loss
        (model(**first).loss * model(**second).loss - reference).backward()
        return gradients_of(model)

    for enable in (reentrant, non_reentrant):
        assert_same(run(enable), run(nothing))


def test_a_part_of_a_block_under_a_wrapper_raises_instead_of_taking_another_h0() -> None:
    model = _model()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        check_fn=lambda module: type(module).__name__ == "LlamaMLP",
    )
    loss = model(**_batches()[0]).loss
    with pytest.raises(RuntimeError, match=r"mlp\.\w+ mixes in the initial residual of 'model.layers'.*stack"):
        loss.backward()


@pytest.mark.parametrize("config", [{}, TRAINABLE_EMBEDDINGS[0]], ids=["frozen", "trainable_embeddings"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_no_h0_outlives_its_step(kind: str, config: dict) -> None:
    model = _model(**config)
    checkpoint(model, KINDS.get(kind, nothing))
    held: list[weakref.ref] = []
    embedding = model.get_base_model().get_input_embeddings()
    embedding.register_forward_hook(lambda m, args, output: held.append(weakref.ref(output.untyped_storage())))
    gc.disable()  # a reference cycle would keep memory until the collector happens to run
    try:
        loss = model(**_batches()[0]).loss
        loss.backward()
        del loss
        with torch.no_grad():
            model(**_batches()[1])
        assert len(held) >= 2
        assert not [reference for reference in held if reference() is not None]
    finally:
        gc.enable()


class _Counter:
    """Counts how often a gradient reaches the initial residual."""

    def __init__(self, model: nn.Module) -> None:
        self.gradient: torch.Tensor | None = None
        first = model.get_base_model().model.layers[0]
        first.register_forward_pre_hook(self._watch)

    def _watch(self, module: nn.Module, args: tuple) -> None:
        if args[0].requires_grad and self.gradient is None:
            args[0].register_hook(self._keep)

    def _keep(self, gradient: torch.Tensor) -> None:
        self.gradient = gradient.clone()


def _gradient_of_h0(model: nn.Module, inputs: dict) -> torch.Tensor | None:
    counter = _Counter(model)
    model(**inputs).loss.backward()
    return counter.gradient


def test_frozen_embeddings_give_h0_no_gradient_even_when_made_to_require_grad() -> None:
    """Then block 0's input still gets the stream's gradient, but not that of the mixes of later blocks."""
    inputs = _batches()[0]
    model = _model()
    assert _gradient_of_h0(model, inputs) is None
    model = _model()
    model.enable_input_require_grads()
    stream_only = _gradient_of_h0(model, inputs)

    model = _model()
    embedded = model.get_base_model().get_input_embeddings()(inputs["input_ids"]).requires_grad_(True)
    exact = _gradient_of_h0(model, {"inputs_embeds": embedded, "labels": inputs["labels"]})
    assert stream_only is not None and exact is not None
    assert (exact - stream_only).abs().max() > 1e-4


def _with_oracle(**config: object) -> tuple[nn.Module, nn.Module]:
    """A model and its oracle: plain LoRA and hooks, through which every gradient flows."""
    targets = ["q_proj", "up_proj"]
    model = _model(target_modules=targets, **config)
    names = [n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]
    kwargs = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    return model, oracle_like(llama, kwargs, model, 0.4, names)


@pytest.mark.parametrize("enable", [nothing, reentrant, non_reentrant])
def test_inputs_embeds_and_soft_prompts_get_the_exact_gradient(enable: Enable) -> None:
    model, oracle = _with_oracle()
    enable(model)
    ids = _batches()[0]["input_ids"]
    gradients = []
    for each in (model, oracle):
        torch.manual_seed(0)
        prompt = torch.randn(2, 2, 32, requires_grad=True)
        embedded = each.get_base_model().get_input_embeddings()(ids)
        each(inputs_embeds=torch.cat([prompt * 1.0, embedded], dim=1)).logits.pow(2).mean().backward()
        gradients.append(prompt.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("enable", [nothing, reentrant, non_reentrant])
@pytest.mark.parametrize("config", TRAINABLE_EMBEDDINGS)
def test_trainable_embeddings_get_the_exact_gradient(config: dict, enable: Enable) -> None:
    model, oracle = _with_oracle(**config)
    enable(model)
    for each in (model, oracle):
        each(**_batches()[0]).loss.backward()
    expected = gradients_of(oracle)
    assert any("embed_tokens" in name for name in expected)
    assert_same(gradients_of(model), expected)


class _KeepsTheFirst(torch.autograd.Function):
    """As functions that offload hidden states: it keeps the first tensor, and returns no other's gradient."""

    @staticmethod
    def forward(ctx: object, function: Callable, hidden_states: torch.Tensor, *rest: object) -> torch.Tensor:
        ctx.function, ctx.rest = function, rest
        ctx.save_for_backward(hidden_states.detach())
        with torch.no_grad():
            output = function(hidden_states, *rest)
        return output[0] if isinstance(output, tuple) else output

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple:
        (hidden_states,) = ctx.saved_tensors
        hidden_states.requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden_states, *ctx.rest)
        output = output[0] if isinstance(output, tuple) else output
        torch.autograd.backward(output, gradient)
        return (None, hidden_states.grad, *[None] * len(ctx.rest))


def _with_function_of_another_library(model: nn.Module) -> list[type | None]:
    """Checkpoint blocks as LLaMA-Factory does: it asks which module it is to call. Returns the classes that it saw."""
    seen = []

    def custom(function: Callable, *args: object, **kwargs: object) -> object:
        owner = getattr(function.func if isinstance(function, functools.partial) else function, "__self__", None)
        seen.append(None if owner is None else type(owner))
        assert args[0].dim() == 3 and args[0].requires_grad
        return _KeepsTheFirst.apply(function, *args)

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = custom
    return seen


def test_other_libraries_functions_checkpoint_a_block() -> None:
    expected, model = _model(), _model()
    plain = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    seen, seen_of_plain = _with_function_of_another_library(model), _with_function_of_another_library(plain)
    for each in (expected, model, plain):
        each(**_batches()[0]).loss.backward()
    assert_same(gradients_of(model), gradients_of(expected))
    assert seen and seen == seen_of_plain


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_hidden_states_that_a_function_makes_require_grad_are_not_h0(use_reentrant: bool) -> None:
    """LLaMA-Factory's writes into the tensor itself, after h0 was taken of it."""
    model, residuals, seen = _model(), [], []

    def custom(function: Callable, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append(residuals[0].frame.value.requires_grad)
        hidden_states.requires_grad_(True)
        seen.append(residuals[0].frame.value.requires_grad)
        return torch_checkpoint(function, hidden_states, *args, use_reentrant=use_reentrant, **kwargs)

    residuals += attached(model.get_base_model())
    model.get_base_model()._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=custom)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The initial residual")
        model(**_batches()[0]).loss.backward()
    assert len(seen) >= 4 and not any(seen)


def test_what_other_libraries_functions_may_lose_is_said() -> None:
    model = _model(**TRAINABLE_EMBEDDINGS[0])
    _with_function_of_another_library(model)
    with pytest.warns(UserWarning, match=r"requires grad.*custom, by which blocks are checkpointed"):
        model(**_batches()[0])


@pytest.mark.parametrize("enable", [nothing, reentrant, non_reentrant, wrapper])
def test_no_layer_is_taken_for_one_that_another_library_computes(enable: Enable) -> None:
    """Each is seen to read h0, also in a checkpoint and as a sibling."""
    model = _model(target_modules="all-linear")
    checkpoint(model, enable)
    (residual,) = attached(model)
    assert residual.check_read is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* mix in the initial residual of .*, but none")
        model(**_batches()[0])
        assert residual.check_read is None
        model = _model(target_modules="all-linear")
        for block in model.get_base_model().model.layers:
            block.mlp.compile(backend="eager")
        model(**_batches()[0])  # of compiled code nothing is known


@pytest.mark.parametrize("enable", [non_reentrant, wrapper])
def test_checkpointed_blocks_compile(enable: Enable) -> None:
    """Without a break of the graph, which would leave them uncompiled."""
    results = []
    for compiles in (False, True):
        model, counter = _model(), CompileCounterWithBackend("aot_eager")
        checkpoint(model, enable)
        torch._dynamo.reset()
        for block in model.get_base_model().model.layers if compiles else ():
            block.compile(backend=counter, fullgraph=True)
        model(**_batches()[0]).loss.backward()
        results.append(gradients_of(model))
    assert counter.frame_count > 0
    assert_same(*results)


def _keeping(way: str, kept: dict[str, torch.Tensor]) -> Callable:
    """A forward hook that notes, replaces or perturbs an embedding's output, as attributions do."""

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        kept["leaf"] = output.requires_grad_()

    def replace(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        kept["leaf"] = output.detach().requires_grad_()
        return kept["leaf"]

    def perturb(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        kept["leaf"] = torch.zeros(output.shape[-1], requires_grad=True)
        return output + kept["leaf"]

    return {"noted": note, "replaced": replace, "perturbed": perturb}[way]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("enable", [reentrant, non_reentrant])
def test_checkpointed_blocks_with_a_break_of_the_graph_train(enable: Enable) -> None:
    """Dynamo leaves the checkpoint to Python, which recomputes in the backward."""
    results = []
    for compiles in (False, True):
        model = _model()
        checkpoint(model, enable)
        for block in model.get_base_model().model.layers:
            block.mlp.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
        torch._dynamo.reset()
        called = torch.compile(model, backend="aot_eager") if compiles else model
        called(**_batches()[0]).loss.backward()
        results.append(gradients_of(model))
    assert_same(*results)


def _as_unsloth_does(module: nn.Module, args: tuple, output: object) -> None:
    if isinstance(output, torch.Tensor):
        output.requires_grad_(True)


def _requires_grad_pre_hook(module: nn.Module, args: tuple) -> None:
    raise AssertionError("only its name is looked at")


def test_no_gradient_of_h0_is_taken_where_hooks_or_speech_models_make_leaves() -> None:
    residual = torch.zeros(1, 3, 8, requires_grad=True)
    for hooked in (False, True):
        embedding = nn.Embedding(3, 8)
        if hooked:
            embedding.register_forward_pre_hook(_requires_grad_pre_hook)
        assert needs_gradient(residual, False, embedding) is not hooked
    _as_unsloth_does.__name__ = "requires_grad_post_hook"
    embedding = nn.Embedding(3, 8)
    embedding.register_forward_hook(_as_unsloth_does)
    assert not needs_gradient(residual, False, embedding)
    sound = torch.zeros(1, 100, requires_grad=True)
    assert not needs_gradient(sound.unfold(1, 8, 8) * 2, False, nn.Embedding(3, 8))


@pytest.mark.parametrize("way", ["noted", "replaced", "perturbed"])
def test_attributions_to_the_embedding_s_output_are_exact(way: str) -> None:
    """The leaf is a hook's, and no parameter: as of `enable_input_require_grads()`, whose hook keeps nothing."""
    gradients = []
    for each in _with_oracle():
        kept: dict[str, torch.Tensor] = {}
        each.get_base_model().get_input_embeddings().register_forward_hook(_keeping(way, kept))
        each(**_batches()[0]).loss.backward()
        gradients.append(kept["leaf"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_functional_call_over_the_embedding_gets_the_exact_gradient() -> None:
    gradients = []
    for each in _with_oracle():
        base = each.get_base_model()
        table = base.get_input_embeddings().weight.detach().clone().requires_grad_(True)
        weights = {"model.embed_tokens.weight": table}
        torch.func.functional_call(base, weights, (), _batches()[0], tie_weights=False).loss.backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_functional_call_over_what_the_embedding_is_computed_from_gets_the_exact_gradient() -> None:
    """As coefficients of task vectors: the swapped tensor is no leaf."""
    gradients = []
    for each in _with_oracle():
        base = each.get_base_model()
        table = base.get_input_embeddings().weight.detach()
        coefficient = torch.tensor(0.5, requires_grad=True)
        weights = {"model.embed_tokens.weight": table + coefficient * torch.linspace(-1, 1, table.shape[1])}
        torch.func.functional_call(base, weights, (), _batches()[0], tie_weights=False).loss.backward()
        gradients.append(coefficient.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("way", ["jvp", "jacfwd", "forward_ad", "of the embedding"])
def test_forward_mode_takes_the_path_through_h0(way: str) -> None:
    derivatives = []
    embedded = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).double()
    tangent = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)).double()
    for each in _with_oracle():
        base = each.get_base_model().double().eval()
        base.set_attn_implementation("eager")
        name = "model.embed_tokens.weight"
        table = base.get_parameter(name).detach()
        of_table = torch.linspace(-1, 1, table.numel(), dtype=torch.float64).view_as(table)

        def logits(x: torch.Tensor, base: nn.Module = base) -> torch.Tensor:
            return base(inputs_embeds=x).logits.mean((0, 1))

        def of_embedding(x: torch.Tensor, base: nn.Module = base, name: str = name) -> torch.Tensor:
            ids = {"input_ids": torch.arange(5)[None]}
            return torch.func.functional_call(base, {name: x}, (), ids, tie_weights=False).logits

        if way == "jvp":
            derivatives.append(torch.func.jvp(logits, (embedded,), (tangent,))[1])
        elif way == "jacfwd":
            derivatives.append(
                torch.func.jacfwd(lambda s, f=logits: f(embedded + s * tangent))(torch.zeros(()).double())
            )
        elif way == "of the embedding":
            derivatives.append(torch.func.jvp(of_embedding, (table,), (of_table,))[1])
        else:
            with forward_ad.dual_level():
                derivatives.append(forward_ad.unpack_dual(logits(forward_ad.make_dual(embedded, tangent))).tangent)
    # lambda is stored in float32
    torch.testing.assert_close(*derivatives, rtol=1e-5, atol=1e-6)


class _Nested(nn.Module):
    """Calls a language model with embeddings that lie somewhere in its own argument."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, batch: object) -> torch.Tensor:
        while not isinstance(batch, torch.Tensor):
            batch = batch[0] if isinstance(batch, list) else batch["e"] if isinstance(batch, Mapping) else batch.e
        return self.language_model(inputs_embeds=batch).logits


@pytest.mark.parametrize(
    "nest",
    [
        lambda e: e,
        lambda e: {"e": {"e": e}},
        lambda e: [[[e]]],
        lambda e: UserDict(e=e),
        lambda e: SimpleNamespace(e=[e]),
    ],
)
def test_an_input_nested_in_the_arguments_gets_the_exact_gradient(nest: Callable) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(_Nested(llama()), SiboLoraConfig(**options, sibo_lambda=0.3))
    randomise_adapters(model)
    names = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    gradients = []
    for each in (model, oracle_like(lambda: _Nested(llama()), options, model, 0.3, names)):
        embedded = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        each(nest(embedded)).pow(2).mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("enable", [reentrant, non_reentrant])
def test_checkpointed_blocks_within_checkpointed_blocks(enable: Enable) -> None:
    """Swin's stages, which are the stack, hold blocks of their own; transformers checkpoints both."""
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, drop_path_rate=0.0
    )
    torch.manual_seed(0)
    model = get_peft_model(
        SwinForImageClassification(config), SiboLoraConfig(r=4, target_modules="all-linear", sibo_lambda=0.3)
    )
    randomise_adapters(model)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)  # or a reentrant checkpoint gives no gradients
    inputs = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    model.train()(**inputs).loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": enable is reentrant})
    model(**inputs).loss.backward()
    assert_same(gradients_of(model), expected)
