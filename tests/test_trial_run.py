"""The trial run of an injection: it sees whole blocks or says so, and leaves the model as it was."""

import copy

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from peft import LoraConfig, get_peft_model
from tiny_models import llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from sibo_triton import SiboLoraConfig, accelerate, explain

ALL = {"r": 2, "target_modules": "all-linear"}


def mixing(model):
    return [row.module for row in explain(model) if row.mixes]


def only_16_bit(module, query, key, value, mask, **options):
    """As flash attention is: it takes no float32, nor weights that are still on the CPU."""
    if query.dtype == torch.float32:
        raise RuntimeError("FlashAttention only supports fp16 and bf16")
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def test_where_the_attention_takes_no_such_weights_an_eager_one_stands_in():
    AttentionInterface.register("only_16_bit", only_16_bit)
    config = llama().config
    config._attn_implementation = "only_16_bit"
    model = tf.LlamaForCausalLM(config)
    expected = mixing(get_peft_model(llama(), SiboLoraConfig(**ALL)))
    model = get_peft_model(model, SiboLoraConfig(**ALL))
    assert mixing(model) == expected and len(expected) == 15
    assert model.config._attn_implementation == "only_16_bit"
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


class SometimesSkips(LlamaDecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.rarely = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, rare=False, **options):
        output = super().forward(hidden_states, **options)
        return output + self.rarely(hidden_states) if rare else output


class HalfABlock(tf.LlamaForCausalLM):
    """Blocks of one of its kinds need more than a trial run passes."""

    def __init__(self, config, kinds):
        super().__init__(config)
        if kinds == 2:
            self.model.layers[1] = SometimesSkips(config, 1)
        for layer in self.model.layers:
            if kinds == 1 or isinstance(layer, SometimesSkips):
                layer.post_attention_layernorm.register_forward_pre_hook(self.refuse)

    def refuse(self, module, args):
        raise RuntimeError("more is needed")


@pytest.mark.parametrize("kinds", [1, 2])
def test_half_a_stack_is_none(kinds):
    model = HalfABlock(llama().config, kinds)
    with pytest.raises(ValueError, match="fed by what is unknown.*more is needed"):
        get_peft_model(model, SiboLoraConfig(**ALL))
    with pytest.warns(UserWarning, match="taken on trust for .*q_proj.*more is needed"):
        model = get_peft_model(model, SiboLoraConfig(**ALL, sibo_target_modules=["q_proj"]))
    assert len(mixing(model)) == 3


def test_what_did_not_run_is_named_and_may_be_taken_on_trust():
    def model():
        made = llama()
        made.model.layers = nn.ModuleList(SometimesSkips(made.config, i) for i in range(3))
        return made

    with pytest.warns(UserWarning, match="rarely get plain LoRA.*they did not run"):
        assert len(mixing(get_peft_model(model(), SiboLoraConfig(**ALL)))) == 15
    with pytest.warns(UserWarning, match="on trust for rarely.*they did not run"):
        asked = get_peft_model(model(), SiboLoraConfig(**ALL, sibo_target_modules=["rarely", "q_proj"]))
    assert len(mixing(asked)) == 6


def bigbird():
    config = tf.BigBirdConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, attention_type="block_sparse", block_size=4, num_random_blocks=1, sep_token_id=3,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return tf.BigBirdForSequenceClassification(config)


def rwkv():
    config = tf.RwkvConfig(
        vocab_size=64, context_length=32, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32,
        intermediate_size=48, rescale_every=2,
    )  # fmt: skip
    return tf.RwkvForCausalLM(config)


@pytest.mark.parametrize(("build", "target"), [(bigbird, "query"), (rwkv, "key")])
def test_the_model_is_left_as_it_was(build, target):
    """BigBird replaces its attentions for few tokens; RWKV divides weights when it is evaluated."""
    base = build().train()
    modules = {name: type(module) for name, module in base.named_modules()}
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attributes = {name: dict(module.__dict__) for name, module in base.named_modules()}
    config = base.config.to_dict()
    twin = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=[target]))
    model = accelerate(get_peft_model(base, LoraConfig(r=2, target_modules=[target])))
    twin.load_state_dict(model.state_dict())
    model = model.unload()
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config
    plain = (bool, int, float, str)
    for name, module in model.named_modules():
        for key, value in attributes[name].items():
            assert not isinstance(value, plain) or module.__dict__[key] == value, f"{name}.{key}"


def in_place(buffer):
    buffer.mul_(2)


def as_out(buffer):
    torch.mul(buffer, 2, out=buffer)


def in_a_list(buffer):
    torch._foreach_mul_([buffer], 2)


@pytest.mark.parametrize("write", [in_place, as_out, in_a_list])
def test_buffers_are_put_back_however_they_are_written(write):
    base = llama()
    base.model.register_buffer("counted", torch.ones(3))
    base.model.layers[1].register_forward_pre_hook(lambda module, args: write(base.model.counted))
    get_peft_model(base, SiboLoraConfig(**ALL))
    assert torch.equal(base.model.counted, torch.ones(3))
    base(torch.ones(1, 2, dtype=torch.long))
    assert torch.equal(base.model.counted, torch.full((3,), 2.0))


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
def test_a_model_that_fsdp_has_sharded_runs_on(process_group):
    """FSDP swaps parameters when its modules run: the trial run must not put the old ones back."""
    base, ids = llama().train(), torch.arange(8)[None]
    config = SiboLoraConfig(**ALL, sibo_lambda=0.3, init_lora_weights=False)
    torch.manual_seed(1)
    expected = get_peft_model(copy.deepcopy(base), config)(input_ids=ids).logits
    mesh = init_device_mesh("cpu", (1,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh)
    torch.manual_seed(1)
    model = get_peft_model(base, copy.deepcopy(config))
    assert all(module.training and "forward" not in module.__dict__ for module in base.model.layers)
    assert len(mixing(model)) == 15
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def albert(blocks):
    config = tf.AlbertConfig(
        vocab_size=32, embedding_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        inner_group_num=blocks, num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return tf.AlbertModel(config), ["encoder.albert_layer_groups.0.albert_layers"]


class Stack(nn.Module):
    def __init__(self, config, blocks):
        super().__init__()
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(blocks))

    def forward(self, hidden_states, **options):
        for layer in self.layers:
            hidden_states = layer(hidden_states, **options)
        return hidden_states


class Recurrent(tf.PreTrainedModel):
    """Recurrent depth: two stacks, each run several times, the second on the sum of both."""

    config_class = tf.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config, blocks):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = LlamaRotaryEmbedding(config)
        self.low, self.high = Stack(config, blocks), Stack(config, blocks)
        self.post_init()

    def forward(self, input_ids):
        low = high = self.embedding(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        options = {"position_embeddings": self.rotary(low, positions), "attention_mask": None}
        for _ in range(2):
            low = self.low(low, **options)
            high = self.high(high + low, **options)
        return high


def recurrent(blocks):
    return Recurrent(llama().config, blocks), None


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("build", "target"), [(albert, "query"), (recurrent, "q_proj")])
def test_stacks_that_one_sequence_passes_several_times_are_refused(build, target, blocks):
    model, names = build(blocks)
    with pytest.raises(ValueError, match="which the model runs several times: name an outer list"):
        get_peft_model(model, SiboLoraConfig(target_modules=[target], sibo_blocks=names))


def test_a_list_with_none_in_it():
    config = tf.InformerConfig(
        prediction_length=4, context_length=8, d_model=32, encoder_layers=3, decoder_layers=2, lags_sequence=[1, 2],
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = get_peft_model(tf.InformerForPrediction(config), LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match="Which layers get the same input was not found"):
        accelerate(model)


def segformer():
    """Takes images of any size: its config names none."""
    sizes = {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "decoder_hidden_size": 8}
    pairs = ("depths", "sr_ratios", "mlp_ratios")
    config = tf.SegformerConfig(
        num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], **sizes, **dict.fromkeys(pairs, [1, 1])
    )
    return tf.SegformerForSemanticSegmentation(config)


def spectrogram_transformer():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.ASTForAudioClassification(tf.ASTConfig(max_length=64, num_mel_bins=32, **small))


@pytest.mark.parametrize("build", [segformer, spectrogram_transformer])
def test_inputs_that_a_config_does_not_name_by_size(build):
    names = ["query", "value", "q_proj", "v_proj"]  # transformers 5.17's and 5.23's
    assert len(mixing(get_peft_model(build(), SiboLoraConfig(r=2, target_modules=names)))) == 4


def test_adapters_may_be_injected_in_inference_mode():
    """Where torch shows modes only the operations that others are made of."""
    expected = mixing(get_peft_model(llama(), SiboLoraConfig(**ALL)))
    with torch.inference_mode():
        assert mixing(get_peft_model(llama(), SiboLoraConfig(**ALL))) == expected != []


class TakesArguments(tf.LlamaForCausalLM):
    def forward(*args):
        return tf.LlamaForCausalLM.forward(*args)


def test_a_forward_that_names_no_arguments():
    config = SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_target_modules=["q_proj"])
    model = get_peft_model(TakesArguments(llama().config), config)  # its decoder has a forward that does
    assert len(mixing(model)) == len(model.get_base_model().model.layers)


class Rectifies(LlamaDecoderLayer):
    def forward(self, hidden_states, **options):
        return super().forward(hidden_states.clone().relu_(), **options)


def test_what_is_written_in_place_is_no_longer_the_stream():
    base = llama()
    for layer in base.model.layers:
        layer.__class__ = Rectifies
    with pytest.raises(ValueError, match="q_proj is not fed by the residual stream"):
        get_peft_model(base, SiboLoraConfig(r=2, target_modules=["q_proj"]))
