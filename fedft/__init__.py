"""Federated LoRA fine-tuning of causal language models with differential privacy, as a Flower App."""

__version__ = "0.1.0"
