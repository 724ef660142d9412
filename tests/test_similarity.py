"""Token similarity against a plain loop over pairs, with padding, on decoders, encoders and encoder-decoders."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from sibo_triton.similarity import similarity_by_layer, token_similarity


def loop_over_pairs(states):
    """The definition: states [tokens, hidden], no padding."""
    tokens = [row.tolist() for row in states.double()]
    total = pairs = 0
    for i, left in enumerate(tokens):
        for j, right in enumerate(tokens):
            if i != j:
                norm = math.sqrt(sum(a * a for a in left)) * math.sqrt(sum(b * b for b in right))
                total += sum(a * b for a, b in zip(left, right, strict=True)) / norm if norm else 0.0
                pairs += 1
    return total / pairs


def tiny_llama():
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_loop_over_pairs(dtype):
    states = (torch.randn(3, 7, 5) + 0.4).to(dtype)
    expected = [loop_over_pairs(sequence) for sequence in states]
    assert token_similarity(states).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_whatever_it_holds(side):
    states = torch.randn(2, 6, 4)
    mask = torch.ones(2, 6, dtype=torch.int64)
    padding = slice(0, 2) if side == "left" else slice(4, 6)
    mask[0, padding] = 0
    states[0, padding] = torch.nan
    real = states[0][mask[0] == 1]
    expected = [loop_over_pairs(real), loop_over_pairs(states[1])]
    assert token_similarity(states, mask).tolist() == pytest.approx(expected, abs=1e-6)


def test_known_values():
    same = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [0.5, 1.0]]])
    opposite = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])
    one_is_zero = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    assert token_similarity(same).item() == pytest.approx(1.0)
    assert token_similarity(opposite).item() == pytest.approx(-1.0)
    assert token_similarity(one_is_zero).item() == pytest.approx(1 / 3)


def test_a_sequence_without_a_pair_is_nan():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    assert token_similarity(torch.randn(3, 3, 4), mask).isnan().tolist() == [True, True, False]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[batch, tokens, hidden\], got \[3, 4\]"):
        token_similarity(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"\[2, 3\], got \[2, 4\]"):
        token_similarity(torch.randn(2, 3, 4), torch.ones(2, 4))


def test_by_layer_over_padded_batches_of_different_sizes():
    """Every sequence counts once, whatever batch and padding it comes in."""
    model = tiny_llama().train()
    sequences = [torch.randint(0, 30, (length,)) for length in (5, 3, 6, 4)]
    with torch.no_grad():
        hidden = [model.eval()(input_ids=s[None], output_hidden_states=True).hidden_states for s in sequences]
    expected = [sum(loop_over_pairs(h[layer][0]) for h in hidden) / 4 for layer in range(4)]

    model.train()
    model.model.layers[1].eval()  # as where a part is kept from dropping
    ids = torch.zeros(3, 6, dtype=torch.int64)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    for row, sequence in enumerate(sequences[:3]):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    alone = sequences[3][None]
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids},
        {"input_ids": alone, "attention_mask": torch.ones_like(alone)},
    ]
    assert similarity_by_layer(model, batches) == pytest.approx(expected, abs=1e-5)
    assert model.training and not model.model.layers[1].training, "modes are restored"
    assert len({round(value, 3) for value in expected}) == 4, "layers must differ for this to prove anything"


def test_an_encoder():
    model = BertModel(
        BertConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    ids = torch.randint(0, 30, (2, 5))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = [sum(loop_over_pairs(sequence) for sequence in layer) / 2 for layer in states]
    assert similarity_by_layer(model, [{"input_ids": ids}]) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_decoder_by_the_stack_that_is_asked_for():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()
    batch = {"input_ids": torch.randint(0, 30, (2, 5)), "decoder_input_ids": torch.randint(0, 30, (2, 4))}
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        expected = [sum(loop_over_pairs(sequence) for sequence in layer) / 2 for layer in getattr(outputs, name)]
        assert similarity_by_layer(model, [batch], output=name) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="returned encoder_hidden_states, decoder_hidden_states"):
        similarity_by_layer(model, [batch])


def test_no_sequence_is_an_error():
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least one sequence of two tokens"):
        similarity_by_layer(model, [])
    with pytest.raises(ValueError, match="at least one sequence of two tokens"):
        similarity_by_layer(model, [{"input_ids": torch.tensor([[3]])}])
    with pytest.raises(ValueError, match="must be one of"):
        similarity_by_layer(model, [], output="logits")
