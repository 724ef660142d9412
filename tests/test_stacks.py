"""Stacks that are run in unusual ways: twice, in a loop, as replicas, with other arguments, under names that moved."""

from __future__ import annotations

import threading
import warnings
from functools import partial

import pytest
import torch
import transformers as tf
from oracle import mix_by_hooks
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, llama, randomise_adapters, token_inputs
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sibo_triton import SiboLoraConfig, explain
from sibo_triton.initial_residual import attached

OPTIONS = {
    "r": 4,
    "target_modules": ["fc"],
    "sibo_lambda": 0.4,
    "sibo_blocks": ["layers"],
    "sibo_target_modules": ["fc"],
}
pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:What feeds modules")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, mask: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states + torch.tanh(self.fc(hidden_states)) * (1 if mask is None else mask)


class Net(nn.Module):
    """Runs its stack once for each input, in one call or in one for each."""

    def __init__(self, loops: int = 1, mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.loops, self.mask = loops, mask

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(self.mask, hidden_states=x)
        return x

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [self.encode(x) for x in inputs]


def pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """A SIBO model and its oracle."""
    model = get_peft_model(Net(**options), SiboLoraConfig(**OPTIONS))
    randomise_adapters(model, 0.5)
    oracle = get_peft_model(Net(**options), LoraConfig(r=4, target_modules=["fc"]))
    oracle.load_state_dict({name: value for name, value in model.state_dict().items() if "sibo" not in name})
    mix_by_hooks(oracle.get_base_model(), 0.4, [f"layers.{index}.fc" for index in range(3)])
    return model, oracle


def test_two_sequences_in_one_call_of_the_owner_are_refused() -> None:
    model, oracle = pair()
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), oracle(x))
    torch.testing.assert_close(model(y), oracle(y))  # in calls of their own each has its h0
    with pytest.raises(RuntimeError, match="first block of 'layers' was entered twice.*sibo_blocks"):
        model(x, y)
    torch.testing.assert_close(model(y), oracle(y))


@pytest.mark.parametrize("implementation", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_two_sequences_are_refused_under_checkpoints_too(implementation: CheckpointImpl) -> None:
    """Where the blocks' own hooks run inside of the checkpoint."""
    model, oracle = pair()
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, wrapper, check_fn=lambda module: isinstance(module, Block))
    x, y = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(model(x), oracle(x))
    with pytest.raises(RuntimeError, match="first block of 'layers' was entered twice.*sibo_blocks"):
        model(x, y)
    torch.testing.assert_close(model(y), oracle(y))
    looping, _ = pair(loops=2)
    expected = looping(x)
    apply_activation_checkpointing(looping, wrapper, check_fn=lambda module: isinstance(module, Block))
    torch.testing.assert_close(looping(x), expected)


def test_another_first_block_is_refused() -> None:
    """Put in front, or left in front in a later stage of a pipeline."""
    model, _ = pair()
    layers = model.get_base_model().layers
    layers.insert(0, Block())
    with pytest.raises(RuntimeError, match="first block of 'layers' is not that of when the adapter was injected"):
        model(torch.randn(2, 3, 8))
    del layers[0]
    model(torch.randn(2, 3, 8))
    del layers[-1]
    model(torch.randn(2, 3, 8))
    del layers[0]
    with pytest.raises(RuntimeError, match=r"first block of 'layers' is not that .* stages of a pipeline"):
        model(torch.randn(2, 3, 8))


class InPlace(Block):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.add_(torch.tanh(self.fc(hidden_states)))


def test_an_h0_that_the_model_writes_into_is_refused() -> None:
    net = Net()
    net.encode = lambda x: net.layers[2](net.layers[1](net.layers[0](x)))
    net.layers = nn.ModuleList([InPlace() for _ in range(3)])
    model = get_peft_model(net, SiboLoraConfig(**OPTIONS))
    with torch.no_grad(), pytest.raises(RuntimeError, match="layers.1.fc mixes in .* has written into that tensor"):
        model(torch.randn(2, 3, 8))


@pytest.mark.parametrize("per_block", [False, True])
def test_compiled_code_keeps_the_h0_that_the_model_writes_into(per_block: bool) -> None:
    """It has no versions of tensors that would tell."""
    net = Net()
    net.encode = lambda x: net.layers[2](net.layers[1](net.layers[0](x)))
    oracle, _ = pair()
    model, x = get_peft_model(net, SiboLoraConfig(**OPTIONS)), torch.randn(2, 3, 8)
    model.load_state_dict(oracle.state_dict())
    for layer in net.layers:
        layer.__class__ = InPlace
    with torch.no_grad():
        (expected,) = oracle(x)
    torch._dynamo.reset()
    if per_block:
        for layer in net.layers:
            layer.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        (found,) = compiled(x.clone())
    torch.testing.assert_close(found, expected)


def test_blocks_that_run_several_times_are_no_second_stream() -> None:
    """Also in compiled code in which layers are eager."""
    model = get_peft_model(
        _albert(), SiboLoraConfig(target_modules=["query"], sibo_blocks=["encoder.albert_layer_groups"])
    )
    ids = torch.ones(1, 4, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* was called twice in one block")
        expected = model(input_ids=ids).last_hidden_state
        layer = model.get_base_model().encoder.albert_layer_groups[0].albert_layers[0].attention.query
        layer.forward = torch.compiler.disable(layer.forward)
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)


class Aside(Net):
    """Its second block gets some of the tokens, and what it returns goes nowhere."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](hidden_states=x)
        self.layers[1](hidden_states=x[:, :1])
        return self.layers[2](hidden_states=x)


def test_a_block_that_gets_all_tokens_after_one_that_got_some_has_h0_of_all() -> None:
    model = get_peft_model(Aside(), SiboLoraConfig(**OPTIONS))
    randomise_adapters(model, 0.5)
    x, seen = torch.randn(2, 3, 8), []
    for layer in model.get_base_model().layers:
        layer.fc.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        layer.fc.lora_A["default"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    for plain, mixed, h0 in zip(seen[::2], seen[1::2], (x, x[:, :1], x), strict=True):
        torch.testing.assert_close(mixed, 0.6 * plain + 0.4 * h0)


def test_blocks_that_write_into_h0_are_seen_in_the_trial_run() -> None:
    for kind, intact in ((None, True), (Adds, False)):
        base = llama()
        for layer in base.model.layers if kind else ():
            layer.__class__ = kind
        model = get_peft_model(base, SiboLoraConfig(target_modules=["q_proj"]))
        (residual,) = attached(model.get_base_model())
        assert residual.is_intact == intact


class Adds(LlamaDecoderLayer):
    """Writes what it returns into its input."""

    def forward(self, hidden_states: torch.Tensor, **options: object) -> torch.Tensor:
        return hidden_states.copy_(super().forward(hidden_states, **options))


class Scatters(tf.LlamaModel):
    """Writes into its embeddings, or a copy of them, before the first block."""

    copies = False

    def forward(self, input_ids: torch.Tensor, **options: object) -> object:
        embeddings = self.embed_tokens(input_ids)
        embeddings = embeddings.clone() if self.copies else embeddings
        embeddings[:, 0] = 1.0
        return super().forward(inputs_embeds=embeddings, use_cache=False, **options)


def _reads_embeddings(base: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = SiboLoraConfig(r=4, target_modules=["up_proj"], sibo_source="embedding", sibo_lambda=0.4)
    model = get_peft_model(base, config).eval()
    randomise_adapters(model, 0.5)
    return model


def test_compiled_code_keeps_the_embedding_that_the_model_writes_into() -> None:
    model, ids = _reads_embeddings(Scatters(llama().config)), torch.arange(8).view(2, 4)
    with torch.no_grad():
        model.get_base_model().copies = True
        expected = model(input_ids=ids).last_hidden_state
        model.get_base_model().copies = False
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_compiled_blocks_keep_the_embedding_that_they_write_into() -> None:
    model, ids = _reads_embeddings(llama()), torch.arange(8).view(2, 4)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        for layer in model.get_base_model().model.layers:
            layer.__class__ = Adds
            layer.compile(backend="aot_eager")
        found = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_an_embedding_that_the_model_writes_into_is_no_source() -> None:
    config = {"r": 4, "target_modules": ["q_proj"]}
    ids = torch.ones(1, 4, dtype=torch.long)
    model = get_peft_model(Scatters(llama().config), SiboLoraConfig(**config, sibo_source="embedding"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="has written .* Use sibo_source='block_input'"):
        model(input_ids=ids)
    model = get_peft_model(Scatters(llama().config), SiboLoraConfig(**config))
    with torch.no_grad():
        model(input_ids=ids)


@pytest.mark.parametrize("views", [False, True], ids=["", "views of it"])
def test_a_sequence_that_loops_through_the_stack_keeps_its_h0(views: bool) -> None:
    """FSDP2 passes each block views of what it gets."""
    model, _ = pair(loops=2)
    x = torch.randn(2, 3, 8)

    def view(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {"hidden_states": kwargs["hidden_states"].view(2, 3, 8)}

    for layer in model.get_base_model().layers if views else ():
        layer.register_forward_pre_hook(view, prepend=True, with_kwargs=True)
    seen = []
    for layer in model.get_base_model().layers:
        layer.fc.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        layer.fc.lora_A["default"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(x)
    assert len(seen) == 12
    for plain, mixed in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(mixed, 0.6 * plain + 0.4 * x)


def test_h0_is_the_argument_named_hidden_states_before_any_other_tensor() -> None:
    mask = torch.rand(2, 3, 8)
    model, oracle = pair(mask=mask)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x), oracle(x))


def _albert() -> nn.Module:
    return tf.AlbertModel(
        tf.AlbertConfig(
            vocab_size=32, embedding_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def test_a_list_that_one_sequence_passes_in_several_calls_is_refused() -> None:
    inner = "encoder.albert_layer_groups.0.albert_layers"
    with pytest.raises(ValueError, match=f"{inner}, which the model runs several times: name an outer list"):
        get_peft_model(_albert(), SiboLoraConfig(target_modules=["query"], sibo_blocks=[inner]))
    outer = get_peft_model(
        _albert(), SiboLoraConfig(target_modules=["query"], sibo_blocks=["encoder.albert_layer_groups"])
    )
    assert all(row.mixes for row in explain(outer))
    outer(input_ids=torch.ones(1, 4, dtype=torch.long))


def _replicate(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a model for each device, on this one."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
    return copies[model]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_replicas_of_data_parallel_under_checkpointing(reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), SiboLoraConfig(r=4, target_modules="all-linear", sibo_lambda=0.4)).train()
    randomise_adapters(model)
    batches = [token_inputs(), token_inputs()]
    sum(model(**batch).loss for batch in batches).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    losses: list[torch.Tensor | Exception] = [torch.tensor(0.0)] * 2

    def run(index: int, replica: nn.Module) -> None:
        try:
            losses[index] = replica(**batches[index]).loss
        except Exception as error:
            losses[index] = error

    threads = [threading.Thread(target=run, args=(index, _replicate(model))) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sum(losses).backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-6)


def test_block_lists_are_found_without_the_head_that_was_around_the_model(tmp_path) -> None:
    torch.manual_seed(0)
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    config = SiboLoraConfig(r=4, target_modules=["q_proj"], sibo_blocks=["model.layers"])
    model = get_peft_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    randomise_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.ones(1, 4, dtype=torch.long)
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    loaded = tf.AutoModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).last_hidden_state, expected)


def test_a_stack_whose_trial_run_fails_is_named_in_a_warning() -> None:
    model = ARCHITECTURES["llava"].build()
    tower = model.model.vision_tower

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not today")

    tower.register_forward_pre_hook(refuse)
    with pytest.warns(UserWarning, match=r"vision_tower.encoder.layers.*get plain LoRA.*not today"):
        get_peft_model(model, SiboLoraConfig(target_modules=["q_proj", "k_proj"]))
