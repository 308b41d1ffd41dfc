"""`python -m bench.off_grid DIR OUT`: the same model with weights that lie on no quantisation's grid.

SmolLM2-135M as it is published has been through 4 bits: its weights lie on a grid of 32 inputs to a scale, and what a second
quantisation loses on them proves little. A few steps of fine-tuning move them by a fiftieth of a grid step. So every input of
every matrix is scaled by a random factor from 1/sqrt(2) to sqrt(2), and whatever gives this input by its inverse: the norm before,
the rows of the value projection, or those of the up-projection. What the model computes stays as it was, rounding apart; its weights
are off the grid.
"""

from pathlib import Path

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

from finback.data.tokenizer import load_tokenizer, save_tokenizer
from finback.model.checkpoint import load, save
from finback.model.gqa import GQA
from finback.model.layers import MLP
from finback.model.transformer import Transformer


def main(source: Positional[Path], out: Positional[Path], seed: int = 0) -> None:
    """Rescale a dense model and write it in float32.

    Args:
        source: A dense model as a Hugging Face directory.
        out: The directory to write.
        seed: Of the factors.
    """
    model = load(source, dtype=torch.float32)
    rescale(model, seed)
    save(model, out)
    save_tokenizer(load_tokenizer(source), out)
    print(f"{out}: the weights of {source}, each input rescaled")


@torch.no_grad()
def rescale(model: Transformer, seed: int) -> None:
    """Scale the inputs of every projection, in place; the function stays."""
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return (torch.rand(count, generator=generator) - 0.5).exp2()

    for block in model.blocks:
        attention, feed_forward = block.self_attn, block.mlp
        assert isinstance(attention, GQA), "a dense model with grouped queries is wanted"
        assert isinstance(feed_forward, MLP), "a dense model is wanted"
        for norm, projections in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (feed_forward.gate_proj, feed_forward.up_proj)),
        ):
            scale = factors(norm.weight.numel())
            norm.weight /= scale
            for projection in projections:
                projection.weight *= scale
        scale = factors(feed_forward.up_proj.weight.shape[0])
        feed_forward.up_proj.weight /= scale.unsqueeze(1)
        feed_forward.down_proj.weight *= scale
        config = model.config
        heads = factors(attention.v_proj.weight.shape[0])
        attention.v_proj.weight /= heads.unsqueeze(1)
        if attention.v_proj.bias is not None:
            attention.v_proj.bias /= heads
        shared = config.num_attention_heads // config.num_key_value_heads
        per_head = heads.view(config.num_key_value_heads, 1, -1).expand(-1, shared, -1)
        attention.o_proj.weight *= per_head.reshape(-1)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.off_grid")
