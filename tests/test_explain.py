"""`explain(model)`: what the table says of each LoRA layer, and that it is readable when printed."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import ARCHITECTURES, llama, randomise_adapters, token_inputs
from torch import nn

from sibo_triton import SiboLoraConfig, explain

READS, NOT_FED = "reads the residual stream", "is not fed by the residual stream"


def sibo_model(name="llama", **options):
    architecture = ARCHITECTURES[name]
    config = SiboLoraConfig(r=2, target_modules=list(architecture.targets), **{"sibo_lambda": 0.3, **options})
    return get_peft_model(architecture.build(), config)


def table(model):
    """What the printed table holds: its header, its rows as columns of text, the line that counts those that mix."""
    lines = str(explain(model)).splitlines()
    end = next(i for i, line in enumerate(lines) if re.match(r"\d+ of ", line))
    edges = [
        column for column, (a, b) in enumerate(zip(" " + lines[1], lines[1], strict=False)) if a == " " and b == "-"
    ]
    spans = list(zip(edges, [*edges[1:], None], strict=True))
    cells = [tuple(line[start:end].strip() for start, end in spans) for line in (lines[0], *lines[2:end])]
    return cells[0], cells[1:], lines[end]


def test_llama_table_row_by_row():
    header, rows, summary = table(sibo_model())
    assert header == ("module", "n", "adapter", "computes", "lambda", "initial residual", "why", "runs")
    stem = "model.layers.*."  # without what PEFT puts in front
    mixing = ("3", "default", "SIBO-LoRA", "0.3", "block_input of model.layers", READS, "fused")
    plain = ("3", "default", "LoRA", "", "", NOT_FED, "fused")
    assert rows == [
        (stem + "self_attn.q_proj", *mixing),
        (stem + "self_attn.k_proj", *mixing),
        (stem + "self_attn.v_proj", *mixing),
        (stem + "self_attn.o_proj", *plain),
        (stem + "mlp.gate_proj", *mixing),
        (stem + "mlp.up_proj", *mixing),
        (stem + "mlp.down_proj", *plain),
    ]
    assert summary == "15 of 21 LoRA layers mix in the initial residual."


def test_llama_table_fits_a_terminal_and_has_no_trailing_spaces():
    lines = str(explain(sibo_model(sibo_learnable=True))).splitlines()
    assert max(map(len, lines)) < 160
    assert len(lines) == 7 + 5  # a star stands for the three blocks
    assert all(line == line.rstrip() for line in lines)


def test_repr_is_the_table_so_that_a_notebook_shows_it():
    explanation = explain(sibo_model())
    assert repr(explanation) == str(explanation)


def test_each_entry_says_everything_about_one_module():
    rows = {row.module: row for row in explain(sibo_model())}
    assert len(rows) == 21
    q = rows["base_model.model.model.layers.1.self_attn.q_proj"]
    assert (q.adapter, q.mixes, q.learnable, q.reason) == ("default", True, False, READS)
    assert q.initial_residual == "block_input of model.layers" and q.lambda_ == pytest.approx(0.3, abs=1e-7)
    o = rows["base_model.model.model.layers.1.self_attn.o_proj"]
    assert (o.mixes, o.lambda_, o.learnable, o.initial_residual, o.reason) == (False, None, False, None, NOT_FED)


def test_it_agrees_with_what_computes():
    """A module mixes according to the table if and only if its own lambda changes the output."""
    model = sibo_model()
    randomise_adapters(model)
    inputs = token_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        for row in explain(model):
            lambdas = getattr(model.get_submodule(row.module), "lora_sibo_lambda", None)
            assert row.mixes == (lambdas is not None)
            if row.mixes:
                lambdas["default"].weight.zero_()
                assert not torch.equal(model(**inputs).logits, before)
                lambdas["default"].weight.fill_(0.3)
    assert torch.equal(model(**inputs).logits, before)


def test_t5_has_two_stacks_and_tells_why_cross_attention_keys_do_not_mix():
    _, rows, summary = table(sibo_model("t5"))
    by_name = {row[0]: row[3:] for row in rows}
    assert by_name["encoder.block.*.layer.0.SelfAttention.k"] == (
        "SIBO-LoRA",
        "0.3",
        "block_input of encoder.block",
        READS,
        "fused",
    )
    assert by_name["decoder.block.*.layer.0.SelfAttention.k"] == (
        "SIBO-LoRA",
        "0.3",
        "block_input of decoder.block",
        READS,
        "fused",
    )
    assert by_name["decoder.block.*.layer.1.EncDecAttention.q"] == (
        "SIBO-LoRA",
        "0.3",
        "block_input of decoder.block",
        READS,
        "fused",
    )
    for key in ("k", "v"):
        reason = "reads another stack's stream (encoder.block)"
        assert by_name[f"decoder.block.*.layer.1.EncDecAttention.{key}"] == ("LoRA", "", "", reason, "fused")
    assert by_name["decoder.block.*.layer.2.DenseReluDense.wo"] == ("LoRA", "", "", NOT_FED, "fused")
    assert summary.startswith("18 of 32 ")


def test_llava_names_the_tower_that_each_module_reads():
    rows = explain(sibo_model("llava"))
    towers = {"vision_tower": "model.vision_tower.encoder.layers", "language_model": "model.language_model.layers"}
    for tower, stack in towers.items():
        origins = {row.initial_residual for row in rows if f".{tower}." in row.module and row.mixes}
        assert origins == {f"block_input of {stack}"}
    assert sum(row.mixes for row in rows) == 27


def test_a_learnable_lambda_is_marked_and_shown_as_it_is_now():
    model = sibo_model(sibo_learnable=True)
    assert {(row.learnable, row.mixes) for row in explain(model)} == {(True, True), (False, False)}
    assert table(model)[1][0][4] == "0.3 (learnable)"
    name = "base_model.model.model.layers.2.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).lora_sibo_lambda["default"].logit_bias.fill_(0.0)  # sigmoid(0)
    assert {row.module: row for row in explain(model)}[name].lambda_ == 0.5
    values = [row[4] for row in table(model)[1] if row[0].endswith("up_proj")]
    assert values == ["0.3 to 0.5 (learnable)"]


def test_plain_adapters_are_plain_whether_lora_config_or_lambda_0():
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"]),
        SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0),
    ):
        _, rows, summary = table(get_peft_model(llama(), config))
        assert rows == [
            ("model.layers.*.self_attn.q_proj", "3", "default", "LoRA", "", "", "plain LoRA adapter", "PEFT")
        ]
        assert summary == "0 of 3 LoRA layers mix in the initial residual."


def test_several_adapters_have_a_row_each_and_deleted_ones_none():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter(
        "one", SiboLoraConfig(r=2, target_modules=["q_proj", "v_proj"], sibo_lambda=0.3, sibo_target_modules=["q_proj"])
    )
    model.add_adapter("two", SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.2, sibo_source="embedding"))
    stem = "model.layers.*.self_attn."
    plain = (stem + "q_proj", "3", "default", "LoRA", "", "", "plain LoRA adapter", "PEFT")
    a = (stem + "q_proj", "3", "one", "SIBO-LoRA", "0.3", "block_input of model.layers", READS, "fused")
    b = (stem + "q_proj", "3", "two", "SIBO-LoRA", "0.2", "embedding of model.layers", READS, "fused")
    unwanted = (stem + "v_proj", "3", "one", "LoRA", "", "", "not among sibo_target_modules", "fused")
    assert table(model)[1] == [plain, a, b, unwanted]
    model.delete_adapter("one")
    assert table(model)[1] == [plain, b]


def test_modules_outside_of_the_blocks_and_embeddings_are_explained():
    config = SiboLoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], sibo_lambda=0.3)
    rows = {row.module: row for row in explain(get_peft_model(llama(), config).base_model.model)}
    for name in ("model.embed_tokens", "lm_head"):
        assert not rows[name].mixes and rows[name].reason == "lies outside of the stacks of blocks"
    assert rows["model.layers.0.self_attn.q_proj"].mixes


def test_models_with_injected_adapters_and_without_any():
    model = llama()
    assert list(explain(model)) == [] and str(explain(model)) == "No adapters."
    inject_adapter_in_model(SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3), model)
    assert [row.module for row in explain(model)] == [f"model.layers.{block}.self_attn.q_proj" for block in range(3)]


def test_modules_taken_on_trust_are_marked_as_not_verified():
    class Wrapped(nn.Module):  # no transformers model around the blocks: nothing to run on a tiny input
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    config = SiboLoraConfig(
        r=2, target_modules=["0", "1"], sibo_target_modules=["0", "1"], sibo_blocks=["layers"], sibo_lambda=0.3
    )
    with pytest.warns(UserWarning, match="taken on trust for 0, 1.*residual stream"):
        model = get_peft_model(Wrapped(), config)
    assert {row.reason for row in explain(model)} == {"named by sibo_target_modules, not verified"}


@pytest.mark.parametrize("value", [None, "model", {}])
def test_something_that_is_no_module_is_refused(value):
    with pytest.raises(TypeError, match="explain takes a torch.nn.Module, got"):
        explain(value)
