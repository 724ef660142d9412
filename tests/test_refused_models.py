"""Models that cannot take what is asked: the error says why and the way out, and the model stays as it was."""

import pytest
import torch
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model
from refusals import (
    TARGETS,
    WAYS,
    assert_as_it_was,
    assert_refused,
    fingerprint,
    through_get_peft_model,
    through_inject_adapter_in_model,
    through_transformers,
)
from tiny_models import ARCHITECTURES, VOCAB, llama, randomise_adapters, token_inputs
from torch import nn

from sibo_triton import SiboLoraConfig, explain

CANNOT_MIX = {
    "attention output projection": (
        {"sibo_target_modules": ["q_proj", "o_proj"]},
        r"asks for model\.layers\.0\.self_attn\.o_proj.*not fed by the residual stream.*Leave it out",
    ),
    "down projection": (
        {"sibo_target_modules": ["down_proj"]},
        r"asks for model\.layers\.0\.mlp\.down_proj.*not fed by the residual stream.*Leave it out",
    ),
    "one block's, by its full name": (
        {"sibo_target_modules": ["q_proj", "model.layers.2.self_attn.o_proj"]},
        r"asks for model\.layers\.2\.self_attn\.o_proj.*Leave it out",
    ),
    "by a pattern": ({"sibo_target_modules": r".*\.(q|o)_proj"}, r"asks for model\.layers\.0\.self_attn\.o_proj"),
    "head": (
        {"sibo_target_modules": ["lm_head"], "target_modules": ["q_proj", "lm_head"]},
        "asks for lm_head.*lies outside of the stacks of blocks.*Leave it out.*plain LoRA",
    ),
    "token embedding": (
        {"sibo_target_modules": ["embed_tokens"], "target_modules": ["q_proj", "embed_tokens"]},
        r"asks for model\.embed_tokens.*lies outside of the stacks.*Leave it out",
    ),
    "a name that nothing has": (
        {"sibo_target_modules": ["q_proj", "q_prj"]},
        "names 'q_prj', which match no module that LoRA targets.*LoRA targets are.*o_proj.*mend the name",
    ),
    "a module without LoRA": (
        {"sibo_target_modules": ["v_proj"]},
        "names 'v_proj', which match no module that LoRA targets.*add the module to target_modules",
    ),
    "a pattern that matches nothing": (
        {"sibo_target_modules": r".*\.nothing"},
        r"sibo_target_modules='\.\*.*nothing' matches none of the LoRA targets.*q_proj",
    ),
    "no target that reads the stream": (
        {"target_modules": ["o_proj", "down_proj"]},
        "None of the 6 LoRA targets can mix.*o_proj is not fed by the residual.*sibo_target_modules.*sibo_lambda=0",
    ),
    "a block list that does not exist": (
        {"sibo_blocks": ["model.layer"]},
        r"sibo_blocks names 'model\.layer', which LlamaForCausalLM does not have.*lists of modules are: model\.layers",
    ),
    "a block list that is no list": (
        {"sibo_blocks": ["model.norm"]},
        r"sibo_blocks names 'model\.norm', a LlamaRMSNorm, but a non-empty nn\.ModuleList",
    ),
}  # fmt: skip


# One for each place that refuses: before injection, after it (each module, the whole), through every way in.
AT_EVERY_DOOR = ["attention output projection", "no target that reads the stream", "a block list that does not exist"]


@pytest.mark.parametrize("case", [case for case in CANNOT_MIX if case not in AT_EVERY_DOOR])
def test_what_cannot_mix_is_refused_and_the_model_left_as_it_was(case):
    assert_refused(through_get_peft_model, llama, *CANNOT_MIX[case], token_inputs())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", AT_EVERY_DOOR)
def test_every_way_in_leaves_the_model_as_it_was(way, case):
    assert_refused(way, llama, *CANNOT_MIX[case], token_inputs())


def output_of_a_valid_adapter(add, inputs):
    torch.manual_seed(1)
    model = add(SiboLoraConfig(r=2, target_modules=["q_proj", "o_proj"], sibo_lambda=0.3))
    assert sum(row.mixes for row in explain(model)) == 3
    randomise_adapters(model)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("way", WAYS)
def test_a_valid_adapter_after_a_refusal_equals_one_without(way):
    inputs = token_inputs()
    base = llama()
    state = base.state_dict()
    outputs = []
    for refused_first in (False, True):
        torch.manual_seed(3)
        model = llama()
        model.load_state_dict(state)
        _, add = way(model)
        if refused_first:
            with pytest.raises(ValueError, match="cannot mix"):
                add(SiboLoraConfig(r=2, target_modules=list(TARGETS), sibo_lambda=0.3, sibo_target_modules=["o_proj"]))
        outputs.append(output_of_a_valid_adapter(add, inputs))
    assert torch.equal(*outputs)
    with torch.no_grad():
        assert not torch.allclose(outputs[0], base(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "asked", "module"),
    [
        ("t5", "EncDecAttention.k", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.k"),
        ("t5", "EncDecAttention.v", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.v"),
        ("bart", "encoder_attn.k_proj", r"model\.decoder\.layers\.0\.encoder_attn\.k_proj"),
        ("bart", "encoder_attn.v_proj", r"model\.decoder\.layers\.0\.encoder_attn\.v_proj"),
    ],
)
def test_cross_attention_keys_and_values_cannot_mix(name, asked, module):
    architecture = ARCHITECTURES[name]
    options = {"target_modules": list(architecture.targets), "sibo_target_modules": [asked]}
    message = f"asks for {module}.*reads another stack's stream.*encoder.*Leave it out"
    assert_refused(through_get_peft_model, architecture.build, options, message, architecture.inputs())


class NoBlocks(nn.Module):
    """Linears in a list, but no transformer blocks: what is a layer's input is anybody's guess."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize("way", [through_get_peft_model, through_inject_adapter_in_model])
def test_a_model_without_transformer_blocks_needs_their_names(way):
    inputs = {"x": torch.randn(2, 3, 8)}
    message = "No list of transformer blocks was found in NoBlocks.*sibo_blocks=.*Its lists of modules are: layers"
    assert_refused(way, NoBlocks, {"target_modules": ["0", "1"]}, message, inputs)


@pytest.mark.parametrize("way", [through_get_peft_model, through_inject_adapter_in_model])
def test_named_blocks_that_cannot_be_traced_need_the_names_of_the_modules_too(way):
    inputs = {"x": torch.randn(2, 3, 8)}
    message = (
        r"None of the 2 LoRA targets can mix.*layers\.0 is fed by what is unknown.*name them in sibo_target_modules"
    )
    assert_refused(way, NoBlocks, {"target_modules": ["0", "1"], "sibo_blocks": ["layers"]}, message, inputs)


@pytest.mark.parametrize("way", [through_inject_adapter_in_model, through_transformers])
def test_a_model_of_transformers_without_blocks_is_left_as_it_was(way):
    """Refused before anything is injected: what transformers noted before it called PEFT must go too."""

    class Tiny(tf.PreTrainedModel):
        config_class = tf.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = NoBlocks()
            self.post_init()

        def forward(self, x):
            return self.inner(x)

    inputs = {"x": torch.randn(2, 3, 8)}
    build = lambda: Tiny(tf.LlamaConfig(hidden_size=32, vocab_size=8, num_hidden_layers=1))  # noqa: E731
    assert_refused(way, build, {"target_modules": ["0", "1"]}, "No list of transformer blocks", inputs)


# --- sibo_source="embedding"


def wide_embedding():
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("way", [through_get_peft_model, through_inject_adapter_in_model, through_transformers])
def test_an_embedding_of_another_width_cannot_be_the_source(way):
    options = {"target_modules": ["q_proj", "fc1"], "sibo_source": "embedding"}
    message = (
        r"sibo_source='embedding': model\.decoder\.layers\.0\.self_attn\.q_proj reads 32 features, but the embedding "
        "has 16.*block_input"
    )
    assert_refused(way, wide_embedding, options, message, token_inputs())


@pytest.mark.parametrize("way", [through_get_peft_model, through_inject_adapter_in_model, through_transformers])
def test_an_embedding_without_a_token_table_cannot_be_the_source(way):
    architecture = ARCHITECTURES["vit"]
    options = {"target_modules": "all-linear", "sibo_source": "embedding"}
    message = "sibo_source='embedding'.*no token (table|embedding).*Use sibo_source='block_input'"
    assert_refused(way, architecture.build, options, message, architecture.inputs())


def test_a_config_read_from_a_sibo_folder_is_refused_alike(tmp_path):
    """`PeftModel.from_pretrained` on a model that lacks the blocks."""
    config = SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3, sibo_blocks=["model.layers"])
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is SiboLoraConfig
    model, inputs = ARCHITECTURES["opt"].build(), token_inputs()
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match=r"sibo_blocks names 'model\.layers', which OPTForCausalLM does not have"):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert_as_it_was(model, inputs, before)
