"""Models whose blocks get, or pass on, something else than the tokens that the first block got."""

import warnings

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny_models import llama, randomise_adapters
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from sibo_triton import SiboAdapterConfig, SiboLoraConfig, explain

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def mixing(model):
    return [row.module.removeprefix("base_model.model.") for row in explain(model) if row.mixes]


def sibo(base, **options):
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    torch.manual_seed(0)
    return get_peft_model(base, SiboLoraConfig(**options)).eval()


def check_layers(model, first_block, *args, **kwargs):
    """Compare what each layer that mixes returns in a forward with the equation, h0 being what entered a block."""
    base, seen = model.get_base_model(), {}
    seen_by = {"h0": lambda module, args, kwargs: seen.update(h0=args[0] if args else kwargs["hidden_states"])}
    handles = [first_block.register_forward_pre_hook(seen_by["h0"], with_kwargs=True)]
    for name in mixing(model):
        hook = lambda layer, args, y, name=name: seen.update({name: (args[0], y)})  # noqa: E731
        handles.append(base.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    for name in mixing(model):
        layer, (x, y) = base.get_submodule(name), seen[name]
        mixed = 0.9 * x + 0.1 * seen["h0"].reshape(x.shape)
        low_rank = layer.lora_B["default"](layer.lora_A["default"](mixed))
        torch.testing.assert_close(y, layer.base_layer(x) + layer.scaling["default"] * low_rank)


def hiera():
    """The first blocks of the later stages read the stage before, and its width, once in each."""
    config = tf.HieraConfig(embed_dim=16, image_size=[64, 64], depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
    of_width_16 = ["0.layers.0.attn.qkv", "0.layers.0.mlp.fc1", "1.layers.0.attn.qkv", "1.layers.0.proj"]
    return tf.HieraModel(config), of_width_16


def focalnet():
    """Its linears read tokens as a plane, [batch, height, width, features]."""
    config = tf.FocalNetConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1])
    return tf.FocalNetModel(config), ["0.layers.0.mlp.fc1", "0.layers.0.modulation.projection_in"]


@pytest.mark.oldest
@pytest.mark.parametrize("build", [hiera, focalnet])
def test_stages_of_which_the_first_has_the_width_of_h0(build):
    base, expected = build()
    model = sibo(base)
    assert sorted(name.removeprefix("encoder.stages.") for name in mixing(model)) == expected
    check_layers(model, base.encoder.stages[0], torch.randn(2, 3, 64, 64))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("kind", "options"), [("VideoMAE", {}), ("Vivit", {"tubelet_size": [2, 8, 8]})], ids=["VideoMAE", "Vivit"]
)
def test_models_of_videos_are_run_on_one(kind, options):
    config = getattr(tf, f"{kind}Config")(**SMALL, image_size=32, patch_size=8, num_frames=4, **options)
    model = sibo(getattr(tf, f"{kind}ForVideoClassification")(config))
    assert len(mixing(model)) == 8  # q, k, v and the first of the feed-forward network, of two blocks
    first = model.get_base_model().get_submodule(mixing(model)[0].partition(".0.")[0] + ".0")
    check_layers(model, first, pixel_values=torch.randn(2, 4, 3, 32, 32))


def wav2vec2_bert():
    config = {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3, "vocab_size": 32, **SMALL}
    return tf.Wav2Vec2BertForCTC(tf.Wav2Vec2BertConfig(**config)), 10, {}


def speech_to_text():
    layers = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in layers.items()}
    config = tf.Speech2TextConfig(vocab_size=40, d_model=32, input_feat_per_channel=16, conv_channels=32, **sizes)
    decoded = {"decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}
    return tf.Speech2TextForConditionalGeneration(config), 18, decoded


@pytest.mark.oldest
@pytest.mark.parametrize("build", [wav2vec2_bert, speech_to_text])
def test_speech_models_that_take_frames_of_a_spectrum(build):
    base, count, others = build()
    model = sibo(base)
    assert len(mixing(model)) == count
    model(input_features=torch.randn(1, 40, 16), **others)


@pytest.mark.oldest
def test_vision_towers_that_take_patches_and_their_grid():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    text = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    model = sibo(tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision)))
    tower = model.get_base_model().model.visual
    names = [name for name in mixing(model) if ".visual." in name]
    assert {name.rpartition("blocks.")[2] for name in names} >= {"0.attn.qkv", "0.mlp.fc1", "1.attn.qkv", "1.mlp.fc1"}
    seen = {}
    tower.blocks[0].register_forward_pre_hook(lambda module, args, kwargs: seen.update(h0=args[0]), with_kwargs=True)
    layer = tower.blocks[1].attn.qkv
    layer.register_forward_hook(lambda module, args, y: seen.update(x=args[0], y=y))
    grid = torch.tensor([[1, 4, 8]])
    with torch.no_grad():
        tower(torch.randn(32, 3 * 2 * 16), grid_thw=grid)
    low_rank = layer.lora_B["default"](layer.lora_A["default"](0.9 * seen["x"] + 0.1 * seen["h0"]))
    torch.testing.assert_close(seen["y"], layer.base_layer(seen["x"]) + layer.scaling["default"] * low_rank)


def gemma4():
    config = tf.Gemma4TextConfig(
        vocab_size=64, head_dim=8, global_head_dim=8, num_key_value_heads=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64, sliding_window=16, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, **{**SMALL, "num_hidden_layers": 4},
    )  # fmt: skip
    return sibo(tf.Gemma4ForCausalLM(config), sibo_lambda=0.4)


@pytest.mark.oldest
def test_blocks_that_get_the_last_tokens_only():
    """Gemma 4's layers that share keys and values, of which a prefill needs the last token only."""
    model, ids = gemma4(), torch.arange(12).view(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found, expected = (model.generate(input_ids=ids, **options, **of) for of in ({}, {"logits_to_keep": 0}))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.oldest
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_blocks_that_get_the_last_tokens_only(checkpointing):
    model, ids = gemma4().train(), torch.arange(12).view(2, 6)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for kept in (3, 0):
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept).logits
        logits[:, -1].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) > 8
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


class Loops(tf.LlamaPreTrainedModel):
    """The list is in a module whose forward does not run, as in Granite-Docling's vision tower."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.rotary = nn.Embedding(config.vocab_size, config.hidden_size), LlamaRotaryEmbedding(config)
        self.encoder = nn.Module()
        self.encoder.layers = llama().model.layers
        self.post_init()

    def forward(self, input_ids):
        hidden_states = self.embedding(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        options = {"position_embeddings": self.rotary(hidden_states, positions), "attention_mask": None}
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states, **options)
        return hidden_states


@pytest.mark.oldest
def test_a_list_whose_parent_does_not_run():
    model = sibo(Loops(llama().config))
    names = mixing(model)
    assert "encoder.layers.1.self_attn.q_proj" in names
    check_layers(model, model.get_base_model().encoder.layers[0], torch.arange(6).view(1, 6))
    bottleneck = get_peft_model(Loops(llama().config), SiboAdapterConfig(bottleneck_size=4))
    assert any(".up_proj" in name for name in mixing(bottleneck))
    bottleneck(torch.arange(6).view(1, 6))


@pytest.mark.oldest
def test_a_second_stream_through_a_module_is_named():
    """XLNet's, of permutation language modelling: what it predicts reads its own token, by h0."""
    config = tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0)
    options = {"sibo_blocks": ["transformer.layer"], "target_modules": ["layer_1"]}
    model, ids = sibo(tf.XLNetLMHeadModel(config), **options).train(), torch.arange(6)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=ids)
    hidden, targets = torch.zeros(1, 6, 6), torch.eye(6)[None]
    hidden[:, :, -1] = 1.0
    with pytest.warns(
        UserWarning, match="layer.0.ff.layer_1 was called twice in one block.*sibo_target_modules"
    ) as seen:
        model(input_ids=ids, perm_mask=hidden, target_mapping=targets)
    assert len(seen) == 1


@pytest.mark.oldest
def test_what_loses_the_stream_may_be_taken_on_trust():
    """TimeSformer puts its tokens together anew in each block."""
    config = tf.TimesformerConfig(**SMALL, image_size=16, patch_size=8, num_frames=2)
    options = {"target_modules": ["intermediate.dense"], "sibo_target_modules": ["intermediate.dense"]}
    with pytest.warns(UserWarning, match="taken on trust for dense.*no linear was seen to read it"):
        model = sibo(tf.TimesformerModel(config), **options)
    assert len(mixing(model)) == 2
    check_layers(model, model.get_base_model().encoder.layer[0], torch.randn(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match="None of the 2 LoRA targets can mix"):
        sibo(tf.TimesformerModel(config), target_modules=["intermediate.dense"])


def chosen(base):
    """The modules that bottleneck adapters choose by default, without the numbers of blocks."""
    model = get_peft_model(base, SiboAdapterConfig(bottleneck_size=4))
    randomise_adapters(model)
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in mixing(model)}


@pytest.mark.oldest
def test_the_gate_of_an_attention_is_no_feed_forward_network():
    config = tf.RecurrentGemmaConfig(
        vocab_size=64, head_dim=8, num_key_value_heads=1, lru_width=32, **{**SMALL, "num_hidden_layers": 3}
    )
    assert chosen(tf.RecurrentGemmaForCausalLM(config)) == {
        "model.layers.mlp_block.gate_proj",
        "model.layers.mlp_block.up_proj",
    }


@pytest.mark.oldest
def test_a_convolution_behind_a_feed_forward_network_is_not_its_use():
    config = tf.Wav2Vec2ConformerConfig(
        conv_dim=[32] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=32, **SMALL
    )
    layers = "wav2vec2_conformer.encoder.layers"
    expected = {f"{layers}.ffn1.intermediate_dense", f"{layers}.ffn2.intermediate_dense"}
    assert chosen(tf.Wav2Vec2ConformerForCTC(config)) == expected


@pytest.mark.oldest
@pytest.mark.parametrize("frozen", [False, True])
def test_what_mixes_does_not_depend_on_what_is_frozen(frozen):
    """torch multiplies DETR's hidden states, which are not contiguous, by way of a view of all of them, or not."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"], layer_type="basic"
    )
    config = tf.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5, **layers,
    )  # fmt: skip
    model = sibo(tf.DetrModel(config).requires_grad_(not frozen), target_modules=["fc1"])
    assert len(mixing(model)) == 4


def longformer():
    config = tf.LongformerConfig(
        attention_window=4, vocab_size=50, max_position_embeddings=64, **{**SMALL, "num_attention_heads": 2}
    )
    return tf.LongformerModel(config)


@pytest.mark.oldest
def test_an_output_of_other_tokens_is_not_mixed():
    """Longformer's queries are [length, batch, features]; a feed-forward network's first half is wider."""
    options = {"bottleneck_size": 4, "side": "output"}
    with pytest.raises(ValueError, match="self.query returns other tokens than those that enter encoder.layer"):
        get_peft_model(longformer(), SiboAdapterConfig(target_modules=["query", "output.dense"], **options))
    get_peft_model(longformer(), SiboAdapterConfig(target_modules=["output.dense"], **options))
    with pytest.raises(ValueError, match="layer.0.intermediate is a LongformerIntermediate that returns 64 features"):
        get_peft_model(longformer(), SiboAdapterConfig(target_modules=r".*\.intermediate", **options))


class WithUnusedBlocks(tf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.unused = nn.ModuleList(tf.LlamaModel(config).layers)


@pytest.mark.oldest
def test_stacks_that_get_no_bottlenecks_by_default_are_named():
    with pytest.warns(UserWarning, match="was found in unused, so there are no adapters .*target_modules"):
        names = chosen(WithUnusedBlocks(llama().config))
    assert names == {"model.layers.mlp.gate_proj", "model.layers.mlp.up_proj"}


@pytest.mark.oldest
def test_convolutions_and_what_has_adapters_already_are_not_named():
    speech = tf.Wav2Vec2Config(
        conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 4], num_feat_extract_layers=2, vocab_size=32,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SMALL,
    )  # fmt: skip
    options = {"bottleneck_size": 4, "placement": "parallel", "target_modules": ["mlp", "self_attn"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(No linear|What feeds)")
        assert len(chosen(tf.Wav2Vec2Model(speech))) == 1
        model = get_peft_model(llama(), SiboAdapterConfig(**options))
        model.add_adapter("second", SiboAdapterConfig(**options))


class GatedByTwo(LlamaAttention):
    """Its output is gated by what two linears make of its input."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate_a, self.gate_b = nn.Linear(config.hidden_size, 4), nn.Linear(4, config.hidden_size)

    def forward(self, hidden_states, *args, **kwargs):
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output * torch.sigmoid(self.gate_b(self.gate_a(hidden_states))), weights


@pytest.mark.oldest
def test_a_linear_beside_those_of_an_attention_is_no_feed_forward_network():
    base = llama()
    for i, layer in enumerate(base.model.layers):
        layer.self_attn = GatedByTwo(base.config, i)
    assert chosen(base) == {"model.layers.mlp.gate_proj", "model.layers.mlp.up_proj"}


@pytest.mark.oldest
def test_only_modules_that_do_not_mix_are_named_as_such():
    """A decoder alone: its cross-attention does not run, and has names that end as its self-attention's do."""
    config = tf.BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64, encoder_layers=1
    )
    with pytest.warns(
        UserWarning, match=r"so encoder_attn\.k_proj, encoder_attn\.v_proj, encoder_attn\.q_proj"
    ) as seen:
        model = sibo(tf.BartForCausalLM(config))
    assert any("self_attn.q_proj" in name for name in mixing(model))
    assert not any("fc1" in str(warning.message) for warning in seen)


def test_sequences_of_modules_are_listed_where_no_list_is_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2)])
            self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    with pytest.raises(ValueError, match=r"Its lists of modules are: blocks\."):
        get_peft_model(Model(), SiboLoraConfig(target_modules=["1"]))
