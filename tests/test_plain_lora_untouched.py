"""A plain `LoraConfig` computes, prints, warns, saves and pickles as if sibo_triton were not imported, bit for bit.

One script (`plain_lora_session.py`) runs in two fresh processes, with sibo_triton imported at its start and at its end,
and prints all that it sees; the outputs are compared as text. Its last part puts SIBO adapters on models that are older
than the import.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import peft.tuners.lora
import pytest
import torch
from peft import LoraConfig, LoraModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tiny_models import llama, randomise_adapters, token_inputs

from sibo_triton import SiboLoraConfig, explain

pytestmark = pytest.mark.oldest

TESTS = Path(__file__).parent
SCRIPT = TESTS / "plain_lora_session.py"


def run(when, folder):
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS.parent), str(TESTS)]))
    env = {**os.environ, "IMPORT": when, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1"}
    result = subprocess.run([sys.executable, str(SCRIPT)], cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the script printed, by when it imported sibo_triton."""
    names = ["early", "late"]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(run, names, [tmp_path_factory.mktemp(name) for name in names]), strict=True))


def test_plain_lora_prints_computes_warns_saves_and_pickles_bit_for_bit_as_without_sibo_triton(results):
    early, late = (results[name].stdout.splitlines() for name in ("early", "late"))
    different = [pair for pair in zip(early, late, strict=False) if pair[0] != pair[1]]
    assert not different, f"{len(different)} lines, the first (with sibo_triton, without): {different[0]}"
    assert len(early) == len(late)
    assert results["early"].stderr == results["late"].stderr


def test_the_script_would_notice(results):
    """It printed weights, gradients, warnings and files, and they are no constants."""
    lines = results["late"].stdout.splitlines()
    for title in ("trained:", "file: README.md", "pickle:", "mixed batch:", "X-LoRA:", "PeftMixedModel:", "  warning"):
        assert any(line.startswith(title) for line in lines), title
    assert len({line for line in lines if line.startswith("step:")}) == 3


def test_sibo_works_on_models_that_were_built_before_the_import(results):
    """With the output that the early import gives (the test above compares it), and it is not plain LoRA's."""
    lines = results["late"].stdout.splitlines()
    mixed = [line.split() for line in lines if line.startswith("SIBO on a model built before")]
    plain = [line.split() for line in lines if line.startswith("the same with lambda = 0")]
    assert [line[-1] for line in mixed] == ["3", "3"]  # q_proj of three blocks
    assert [line[-2] for line in mixed] != [line[-1] for line in plain] and len(plain) == 2


def test_pefts_mapping_of_lora_is_its_own():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig is peft.tuners.lora.LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel is peft.tuners.lora.LoraModel
    for kind in (LoraConfig, LoraModel, peft.tuners.lora.Linear):
        assert kind.__module__.startswith("peft.tuners.lora.")
    types = {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert types - {kind.value for kind in PeftType} == {"SIBO_LORA"}  # all that was added
    assert "SIBO_LORA" not in {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_TUNER_MAPPING}


def plain_and_lambda_0(tmp_path):
    """The same training twice: under `LoraConfig` and under `SiboLoraConfig(sibo_lambda=0)`."""
    for name, kind, options in (("lora", LoraConfig, {}), ("sibo", SiboLoraConfig, {"sibo_lambda": 0})):
        torch.manual_seed(0)
        model, inputs = llama(), token_inputs()
        targets = ["q_proj", "o_proj", "up_proj"]
        model = get_peft_model(
            model, kind(r=4, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
        )
        randomise_adapters(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**inputs).loss.backward()
        optimizer.step()
        model.eval().save_pretrained(tmp_path / name)
        yield model, model(**inputs).logits


def test_lambda_0_trains_saves_and_runs_as_plain_lora_byte_for_byte(tmp_path):
    (lora, lora_output), (sibo, sibo_output) = plain_and_lambda_0(tmp_path)
    assert torch.equal(lora_output, sibo_output)
    names = sorted(path.name for path in (tmp_path / "lora").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "sibo").iterdir())
    for name in names:
        assert (tmp_path / "lora" / name).read_bytes() == (tmp_path / "sibo" / name).read_bytes(), name
    assert repr(lora) == repr(sibo)
    for ours, theirs in zip(sibo.modules(), lora.modules(), strict=True):
        assert type(ours) is type(theirs) and sorted(vars(ours)) == sorted(vars(theirs))
        assert len(ours._forward_hooks) == len(ours._forward_pre_hooks) == 0
        assert len(ours._load_state_dict_pre_hooks) == len(theirs._load_state_dict_pre_hooks)
        assert not getattr(ours, "lora_variant", None)
    assert not any(row.mixes for row in explain(sibo))


def test_a_plain_adapter_beside_a_sibo_adapter_computes_as_it_did():
    """Bit for bit, in outputs and gradients, active alone on a model that has SIBO adapters too."""
    model, inputs = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"])), token_inputs()
    randomise_adapters(model)

    def outputs_and_gradients():
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".default." in n}
        return output.logits.detach(), gradients

    expected, expected_gradients = outputs_and_gradients()
    model.add_adapter("sibo", SiboLoraConfig(r=4, target_modules=["q_proj", "o_proj"], sibo_lambda=0.3))
    found, gradients = outputs_and_gradients()
    assert torch.equal(found, expected)
    assert len(gradients) == 12 and all(torch.equal(gradients[n], expected_gradients[n]) for n in gradients)
    model.set_adapter("sibo")
    randomise_adapters(model)
    assert not torch.allclose(model(**inputs).logits, expected)
