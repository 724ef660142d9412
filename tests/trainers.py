"""transformers' Trainer on a tiny model, as the tests of both kinds of adapters run it."""

import torch
from transformers import Trainer, TrainingArguments


def examples(seed=0):
    rows = torch.randint(3, 50, (10, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_for(model, folder, **options):
    defaults = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 0, "weight_decay": 0.1,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    return Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(1))


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
