"""Where the weights of a new run come from: drawn from its seed, or taken from a directory (continued pre-training)."""

from dataclasses import fields

import torch

from finback.config import InputError, ModelConfig
from finback.model.checkpoint import hf_tensors, load, open_checkpoint
from finback.model.transformer import Transformer, init_weights
from finback.train.config import PretrainConfig

# What a directory may have otherwise: how weights are stored, how they were drawn, and which tokens the tokenizer calls special.
_FREE = ("torch_dtype", "fp8", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


def check_init_from(config: PretrainConfig) -> None:
    """InputError, naming the first field that differs, unless the weights in `init_from` are those of the run's model."""
    if config.init_from is None:
        return
    stored = open_checkpoint(config.init_from).config
    for field in fields(ModelConfig):
        there, here = getattr(stored, field.name), getattr(config.model, field.name)
        if field.name not in _FREE and there != here:
            remedy = "give the model the value of its weights"
            if field.name == "num_nextn_predict_layers" and there == 0:
                remedy = "it holds no MTP weights, so set the model's to 0"
            raise InputError(f"init_from {config.init_from} has {field.name} {there}, and the model has {here}; {remedy}")


def initialise(model: Transformer, config: PretrainConfig) -> None:
    """Give the new run's model its weights, router biases included."""
    if config.init_from is None:
        init_weights(model, config.seed)
        return
    device = next(model.parameters()).device
    source = load(config.init_from, dtype=torch.float32, device=device)
    with torch.no_grad():
        for (name, tensor), (source_name, stored) in zip(hf_tensors(model), hf_tensors(source), strict=True):
            assert name == source_name
            tensor.copy_(stored)
