"""Fine-tuning: what `sibo-triton finetune` and `sibo-triton demo` run.

Transformers' Trainer does the training. This package reads and checks the data, adds the adapter, measures, and
reports. It needs `pip install 'sibo-triton[finetune]'`.
"""
