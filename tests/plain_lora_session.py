"""Run by test_plain_lora_untouched.py in fresh processes: uses plain LoRA in every way and prints all that it sees.

The environment variable IMPORT says when sibo_triton is imported: "early", before PEFT, or "late", after all of it.
"""

import copy
import hashlib
import inspect
import io
import os
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)
random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
before_import = list(warnings.filters)
if os.environ["IMPORT"] == "early":
    import sibo_triton
catcher = warnings.catch_warnings(record=True)
caught = catcher.__enter__()
warnings.simplefilter("always")

import peft  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.utils.hotswap import hotswap_adapter  # noqa: E402
from tiny_models import llama, randomise_adapters, token_inputs  # noqa: E402


def digest(value):
    if isinstance(value, torch.Tensor):
        value = (str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes())
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()[:16]


def show(title, *values):
    print(f"{title}:", *values)
    while caught:
        warning = caught.pop(0)
        print("  warning", warning.category.__name__, Path(warning.filename).name, warning.lineno, warning.message)


def state(model):
    """Everything that a model holds besides its values, its hooks among it, and digests of the values."""
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)]
        yield name, type(module).__module__, type(module).__qualname__, sorted(vars(module)), hooks
    for name, parameter in model.named_parameters():
        yield name, parameter.requires_grad, digest(parameter)
    for name, buffer in model.named_buffers():
        yield name, digest(buffer)


def output(model):
    with torch.no_grad():
        return digest(model(**inputs).logits)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


show("filters", before_import == warnings.filters[1:])
show("generators", digest(torch.get_rng_state()), digest(random.getstate()), digest(np.random.get_state()))
for owner, name in [
    (peft.LoraModel, "inject_adapter"),
    (peft.LoraModel, "merge_adapter"),
    (peft.LoraModel, "merge_and_unload"),
    (peft.LoraModel, "delete_adapter"),
    (peft.tuners.lora.Linear, "merge"),
    (PeftModel, "load_adapter"),
    (PeftModel, "add_adapter"),
    (transformers.PreTrainedModel, "load_adapter"),
    (transformers.PreTrainedModel, "add_adapter"),
]:
    function = getattr(owner, name)
    show(function.__qualname__, function.__module__, inspect.signature(function), digest(inspect.getdoc(function)))

folder = Path("saved")  # below a working directory of its own, so that what is printed does not tell the runs apart
inputs = token_inputs()

# One adapter: train, save, load
config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], lora_dropout=0.2, task_type="CAUSAL_LM")
show("config", config, config.to_dict(), digest(pickle.dumps(config)), copy.deepcopy(config) == config)
model = get_peft_model(llama(), config)
show("model", repr(model), model.peft_config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(3):
    loss = model(**inputs).loss
    loss.backward()
    show("step", loss.item().hex(), {n: digest(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    optimizer.step()
    optimizer.zero_grad()
model.eval()
show("trained", output(model), *state(model))
show("state dict", {name: digest(tensor) for name, tensor in model.state_dict().items()})
show("adapter's", {name: digest(tensor) for name, tensor in peft.get_peft_model_state_dict(model).items()})
show("pickle", digest(pickle.dumps(model.peft_config)), digest(saved(model)))
show("unpickled", output(torch.load(io.BytesIO(saved(model)), weights_only=False)))
show("deepcopy", repr(copy.deepcopy(model)) == repr(model), output(copy.deepcopy(model)))
model.save_pretrained(folder / "a")
for path in sorted((folder / "a").iterdir()):
    show("file", path.name, digest(path.read_bytes()))
torch.manual_seed(0)
base = llama().eval()
model = PeftModel.from_pretrained(copy.deepcopy(base), folder / "a")
show("loaded", repr(model), output(model), *state(model))
model.load_adapter(folder / "a", "again", low_cpu_mem_usage=True)
model.set_adapter("again")
show("loaded again", output(model), model.get_layer_status(), model.get_model_status())
hotswap_adapter(model, str(folder / "a"), "again")
show("hotswapped", output(model))
try:
    model.load_adapter(folder / "nothing", "nothing")
except Exception as error:
    show("no such folder", type(error).__name__, list(model.peft_config))
show("with biases", *state(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], bias="all"))))

# Several adapters
model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear")).eval()
model.add_adapter("rs", LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True, rank_pattern={"q_proj": 3}))
model.add_adapter("dora", LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
model.add_adapter("lora_", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
randomise_adapters(model)
show("several", repr(model))
for names in ("default", "rs", "dora", ["rs", "dora"], ["default", "rs"]):
    model.base_model.set_adapter(names)
    show(names, output(model))
with torch.no_grad():
    ids = inputs["input_ids"]
    show("mixed batch", digest(model(input_ids=ids, adapter_names=["rs", "__base__"]).logits))
    generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, num_beams=2, pad_token_id=0)
    show("generated", generated.tolist())
with model.disable_adapter():
    show("disabled", output(model))
model.set_adapter("rs")
model.merge_adapter()
show("merged", output(model), *state(model))
model.unmerge_adapter()
model.delete_adapter("lora_")
model.add_weighted_adapter(["default", "rs"], [1.0, 0.5], "both", combination_type="svd")
show("combined", list(model.peft_config), *state(model))
for bad in ({"target_modules": ["nothing"]}, {"target_modules": ["q_proj"], "layers_to_transform": [7]}):
    try:
        model.add_adapter("bad", LoraConfig(**bad))
    except Exception as error:
        show("refused", type(error).__name__, error, list(model.peft_config), *state(model))
show("merged and unloaded", output(model.merge_and_unload()))
model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear")).unload()
show("unloaded", repr(model), output(model), *state(model))

# Other doors
model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), copy.deepcopy(base))
show("injected", repr(model), output(model), *state(model))
model = copy.deepcopy(base)
model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
model.load_adapter(str(folder / "a"), "loaded")
show("transformers'", repr(model), output(model), *state(model))
model.delete_adapter("loaded")
show("transformers', deleted", *state(model))
model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
model.add_adapter("loha", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
show("PeftMixedModel", repr(model), output(model), *state(model))
model = get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10))
show("AdaLora", repr(model), output(model), *state(model))
base.config.use_cache = False
x_config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"0": str(folder / "a")})
model = get_peft_model(copy.deepcopy(base), x_config)
show("X-LoRA", repr(model), output(model), *state(model))

# SIBO adapters on models that were built in this process, with IMPORT=late before sibo_triton was imported
options = {"r": 4, "target_modules": ["q_proj", "o_proj"]}
peft_model = get_peft_model(copy.deepcopy(base), LoraConfig(**options), adapter_name="plain")
transformers_model = copy.deepcopy(base)
transformers_model.add_adapter(LoraConfig(**options), adapter_name="plain")
randomise_adapters(peft_model)
randomise_adapters(transformers_model)
plain_outputs = [output(peft_model), output(transformers_model)]

import sibo_triton  # noqa: E402

peft_model.add_adapter("sibo", sibo_triton.SiboLoraConfig(**options, sibo_lambda=0.3))
assert output(peft_model) == plain_outputs[0]
transformers_model.add_adapter(sibo_triton.SiboLoraConfig(**options, sibo_lambda=0.3), adapter_name="sibo")
for number, model in enumerate([peft_model, transformers_model]):
    model.set_adapter("plain")
    assert output(model) == plain_outputs[number]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sibo." in name:
                parameter.normal_(0.0, 0.2)
    model.set_adapter("sibo")
    mixing = sum(row.mixes for row in sibo_triton.explain(model))
    show("SIBO on a model built before", output(model), mixing)
    for name, buffer in model.named_buffers():
        if "sibo_lambda" in name:
            buffer.zero_()
    show("the same with lambda = 0", output(model))
catcher.__exit__(None, None, None)
