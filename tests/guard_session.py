"""Run by test_guard.py in a fresh process that has no sibo_triton: loads a SIBO adapter's weights in every way.

Prints, as JSON, what each way raised, or whether the adapter's weights are in the model then, by architecture. The
arguments are, for each of these, its name, the folders of the base model, of the adapter, of a Trainer checkpoint with
that adapter and of a plain adapter, and the LoRA targets.
"""

import json
import sys
import warnings

import torch
import transformers
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
base = adapter = checkpoint = plain = targets = None  # those of the architecture that is at work


def config(modules=None, **options):
    return LoraConfig(r=4, target_modules=list(modules or targets), task_type="CAUSAL_LM", **options)


def fresh():
    return AutoModelForCausalLM.from_pretrained(base)


def lora(modules=None, **options):
    return get_peft_model(fresh(), config(modules, **options))


def injected():
    model = fresh()
    model.add_adapter(config())
    return model


def trainer():
    rows = torch.randint(3, 50, (4, 6)).tolist()
    options = {"max_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments("trained", **options)
    return Trainer(model=lora(), args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def resume(loading):
    loading.train(resume_from_checkpoint=checkpoint)


def best_model(loading):
    loading.state.best_model_checkpoint = checkpoint
    loading._load_best_model()


def without_prefix(tensors):
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def with_adapter_name(tensors):
    parts = [(*name.rpartition("."), tensor) for name, tensor in tensors.items()]
    return {f"{stem}.default.{last}": tensor for stem, _, last, tensor in parts}


def weights():
    return load_peft_weights(adapter)


# what the weights are loaded onto, and how
WAYS = {
    "load_adapter": (lora, lambda m: m.load_adapter(adapter, "default")),
    "load_adapter, is_trainable": (lora, lambda m: m.load_adapter(adapter, "default", is_trainable=True)),
    "load_adapter, low_cpu_mem_usage": (lora, lambda m: m.load_adapter(adapter, "default", low_cpu_mem_usage=True)),
    "load_adapter, fewer modules": (lambda: lora(targets[1:]), lambda m: m.load_adapter(adapter, "default")),
    "load_adapter, one module": (lambda: lora(targets[:1]), lambda m: m.load_adapter(adapter, "default")),
    "load_adapter, a loaded adapter": (
        lambda: PeftModel.from_pretrained(fresh(), plain),
        lambda m: m.load_adapter(adapter, "default"),
    ),
    "from_pretrained, config": (fresh, lambda m: PeftModel.from_pretrained(m, adapter, config=config())),
    "from_pretrained, config, low_cpu_mem_usage": (
        fresh,
        lambda m: PeftModel.from_pretrained(m, adapter, config=config(), low_cpu_mem_usage=True),
    ),
    "PeftMixedModel": (lambda: PeftMixedModel(fresh(), config()), lambda m: m.load_adapter(adapter, "default")),
    "set_peft_model_state_dict": (lora, lambda m: set_peft_model_state_dict(m, weights())),
    "set_peft_model_state_dict, injected": (injected, lambda m: set_peft_model_state_dict(m, weights())),
    "set_peft_model_state_dict, injected, no prefix": (
        injected,
        lambda m: set_peft_model_state_dict(m, without_prefix(weights())),
    ),
    "transformers, config": (fresh, lambda m: m.load_adapter(adapter, peft_config=config())),
    "transformers, state dict": (
        fresh,
        lambda m: m.load_adapter(peft_config=config(), adapter_state_dict=without_prefix(weights())),
    ),
    "transformers, hotswap": (injected, lambda m: m.load_adapter(adapter, "default", hotswap=True)),
    "transformers, hotswap, config": (
        injected,
        lambda m: m.load_adapter(adapter, "default", peft_config=config(), hotswap=True),
    ),
    "hotswap": (lora, lambda m: hotswap_adapter(m, adapter, "default")),
    "hotswap, state dict": (
        lora,
        lambda m: hotswap_adapter_from_state_dict(m, with_adapter_name(weights()), "default", config()),
    ),
    "Trainer, resume": (trainer, resume),
    "Trainer, best model": (trainer, best_model),
    # not refused: the user asks for it
    "ignore_mismatched_sizes": (lora, lambda m: m.load_adapter(adapter, "default", ignore_mismatched_sizes=True)),
    "a plain adapter": (lora, lambda m: m.load_adapter(plain, "default")),
}


def copied(model, folder):
    """Whether the model holds a LoRA matrix of the adapter in `folder`."""
    matrices = [tensor for name, tensor in load_peft_weights(folder).items() if "lora_B" in name]
    held = [tensor for name, tensor in model.state_dict().items() if "lora_B" in name]
    return any(torch.equal(tensor, other) for tensor in matrices for other in held)


def result_of(way):
    make, load = WAYS[way]
    made = make()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            load(made)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    text = "copied" if copied(getattr(made, "model", made), plain if "plain" in way else adapter) else "nothing copied"
    return " ".join([text, *(str(warning.message) for warning in warned if "mismatch" in str(warning.message))])


results, arguments = {}, iter(sys.argv[1:])
for of in zip(*[arguments] * 6, strict=True):
    architecture, base, adapter, checkpoint, plain, words = of
    targets = words.split(",")
    results[architecture] = {way: result_of(way) for way in WAYS}
assert not any(name.partition(".")[0] == "sibo_triton" for name in sys.modules)
print(json.dumps(results))
