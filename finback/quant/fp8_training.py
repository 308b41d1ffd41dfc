"""FP8 training as a pass over a finished model (V3 section 3.3.1): which products are FP8, and which stay as they are."""

from functools import partial

from finback.model.gqa import GQA
from finback.model.layers import MLP, Linear
from finback.model.mla import MLA
from finback.model.moe import Experts
from finback.model.transformer import Transformer
from finback.ops.fp8_linear import V3, Recipe, fp8_linear, fp8_linear_after_attention, fp8_swiglu_feed_forward


def train_in_fp8(model: Transformer, recipe: Recipe = V3) -> None:
    """Let attention's projections, the dense feed-forwards, the shared and the routed experts multiply in FP8, in forward and backward.

    Embedding, head, the router, norms, attention itself and the projection in front of an MTP block stay in higher precision.
    Parameters stay what they are: their float32 values are the master weights, and every forward pass quantises them.
    """
    for module in model.modules():
        if isinstance(module, MLA | GQA):
            for name, projection in module.named_children():
                if isinstance(projection, Linear):
                    product = fp8_linear_after_attention if name == "o_proj" else fp8_linear
                    projection.product = partial(product, recipe=recipe)
        elif isinstance(module, MLP | Experts):
            module.whole = partial(fp8_swiglu_feed_forward, recipe=recipe)
