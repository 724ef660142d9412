"""Fine-tuning: what `sibo-triton finetune` and `sibo-triton demo` run.

Transformers' Trainer does the training. This package reads and checks the data, puts the adapter on, measures, and
reports. It needs `pip install 'sibo-triton[finetune]'`.
"""
