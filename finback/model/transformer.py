"""The DeepSeek-V3 transformer (V3 section 2): pre-norm blocks of MLA and feed-forward, and the MTP modules behind them. Dense
students (Llama, Qwen2, Qwen3) are the same with grouped-query attention in every block, no experts and no MTP.

The module tree carries the published parameter names, so a checkpoint needs almost no map: experts are stacked here and separate on
disk, and MTP modules share the embedding and the head that the files repeat.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finback.config import ModelConfig
from finback.model.gqa import GQA
from finback.model.layers import MLP, Linear, RMSNorm
from finback.model.mla import MLA, Rotary
from finback.model.moe import Experts, MoE, Router, Routing
from finback.model.recompute import rebuilt
from finback.ops.attention import Attend, causal_attention, document_mask
from finback.ops.packed import PackedWeight
from finback.ops.rotary import rotary_table
from finback.ops.router import document_balance, sequence_balance
from finback.ops.shared_prefix import SharedPrefixes

Recompute = Literal["none", "selective", "full"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); dense for the first `first_k_dense_replace` layers, MoE after."""

    def __init__(
        self, config: ModelConfig, layer: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.self_attn: MLA | GQA = MLA(config, device, dtype) if config.kv_lora_rank else GQA(config, device, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.mlp: MLP | MoE
        if layer < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, device, dtype)
        else:
            self.mlp = MoE(config, device, dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: Rotary,
        attend: Attend = causal_attention,
        recompute: bool = False,
        chosen: Int[Tensor, "B T K"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        normalised = self.input_layernorm(x)
        with rebuilt((normalised,), lambda: (self.input_layernorm(x),), recompute):
            middle = x + self.self_attn(normalised, rotary, attend, recompute)
        return self.feed_forward(middle, recompute, chosen)

    def feed_forward(
        self, x: Float[Tensor, "B T D"], recompute: bool = False, chosen: Int[Tensor, "B T K"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """x + feed-forward(norm(x)), and what the router did if there is one; `chosen` is what it is to choose, see `Router`."""
        normalised = self.post_attention_layernorm(x)
        with rebuilt((normalised,), lambda: (self.post_attention_layernorm(x),), recompute):
            if isinstance(self.mlp, MLP):
                return x + self.mlp(normalised, recompute), None
            output, routing = self.mlp(normalised, recompute, chosen)
            return x + output, routing


class SharedHead(nn.Module):
    """The part of `shared_head` that is not shared: its norm."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)


class MTPModule(Block):
    """One depth of multi-token prediction (V3 section 2.2): a block over [enorm(embedding) ; hnorm(previous hidden state)].

    The released weights put the embedding first, unlike the paper's equation. The hidden state that comes in, of the main model or of
    the depth before, has passed its final norm.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, config.num_hidden_layers, device, dtype)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, device, dtype)
        self.shared_head = SharedHead(config, device, dtype)

    def combine(self, hidden: Float[Tensor, "B T D"], embedding: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The input of the block: what is known up to token i, with the embedding of token i + 1."""
        joined = torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1)
        projected: Tensor = self.eh_proj(joined)
        return projected


class Decoder(nn.Module):
    """Everything but the head; `layers` holds the main blocks, then the MTP modules, as the published files number them."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        # From its weights: left to itself it draws them, which on the meta device imports torch's compiler, for seconds.
        weight = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        blocks: list[Block] = [Block(config, layer, device, dtype) for layer in range(config.num_hidden_layers)]
        blocks += [MTPModule(config, device, dtype) for _ in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)


class TrainOutput(NamedTuple):
    """Hidden states before the head, and what balancing needs."""

    hidden: Tensor  # [B, T, D], after the final norm
    mtp_hidden: list[Tensor]  # depth k: [B, T - 1 - k, D], after its shared_head.norm
    expert_counts: Tensor  # int64 [routers, E]: tokens per expert in this micro-batch, padding left out
    balance_loss: Tensor  # scalar: V3 equation 17, mean over sequences (documents, where they are told), summed over routers


class SamplesOutput(NamedTuple):
    """What `samples_forward` says of N tokens."""

    hidden: Tensor  # [N, D], after the final norm
    mtp_hidden: list[Tensor]  # depth k: [N, D], after its shared_head.norm
    expert_counts: Tensor  # int64 [routers, E]: choices of experts, each as often as its token counts


class Transformer(nn.Module):
    """A language model of one of the families of ModelConfig. Parameters are allocated, not initialised: see `init_weights` and
    `finback.load`. With `tie_word_embeddings`, head and embedding are one parameter, and it goes by the embedding's name."""

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.source_directory: Path | None = None  # where it was loaded from: `save` carries the tokenizer over
        device = None if device is None else torch.device(device)
        self.model = Decoder(config, device, dtype)
        head_device = torch.device("meta") if config.tie_word_embeddings else device
        self.lm_head = Linear(config.hidden_size, config.vocab_size, head_device, dtype)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Moving to a device or from the meta device may make new parameters: the two names are tied again."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but a tied head needs no entry of its own, and stays tied when tensors are assigned."""
        if self.config.tie_word_embeddings:
            state_dict = {**state_dict, "lm_head.weight": state_dict.get("model.embed_tokens.weight", self.lm_head.weight)}
        result = super().load_state_dict(state_dict, strict, assign)
        self._tie()
        return result

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the main model."""
        return list(self.model.layers[: self.config.num_hidden_layers])  # type: ignore[arg-type]

    @property
    def mtp_modules(self) -> list[MTPModule]:
        return list(self.model.layers[self.config.num_hidden_layers :])  # type: ignore[arg-type]

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights as they are: packed ones packed, and a tied matrix once."""
        plain = sum(parameter.nbytes for parameter in self.parameters() if not parameter.is_meta)
        return plain + sum(weight.nbytes for weight in self._packed())

    @property
    def is_packed(self) -> bool:
        """Whether weights were packed in the place of plain ones (`load(packed=True)`): then there is nothing to train or to save."""
        return any(parameter.is_meta for parameter in self.parameters()) and bool(self._packed())

    def _packed(self) -> list[PackedWeight]:
        """What Linear and Experts hold packed."""
        layers = [module.packed for module in self.modules() if isinstance(module, Linear) and module.packed is not None]
        stacks = [module.packed for module in self.modules() if isinstance(module, Experts) and module.packed is not None]
        return [*layers, *(weight for stack in stacks for weight in stack)]

    def routers(self) -> list[Router]:
        """Every router, main layers first, then MTP: the rows of `TrainOutput.expert_counts`."""
        blocks = [*self.blocks, *self.mtp_modules]
        return [block.mlp.gate for block in blocks if isinstance(block.mlp, MoE)]

    def forward(
        self, input_ids: Int[Tensor, "B T"], *, mtp: bool = False
    ) -> Float[Tensor, "B T vocab"] | tuple[Float[Tensor, "B T vocab"], list[Tensor]]:
        """Logits [B, T, vocab_size]; with `mtp`, also a list over depths k of logits [B, T - 1 - k, vocab_size], whose row i
        predicts token i + 2 + k."""
        output = self.train_forward(input_ids, mtp=mtp)
        logits = self.lm_head(output.hidden)
        return (logits, [self.lm_head(hidden) for hidden in output.mtp_hidden]) if mtp else logits

    def train_forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        document_ids: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
        recompute: Recompute = "none",
        mtp: bool = True,
    ) -> TrainOutput:
        """Hidden states and balance terms of whole sequences. `document_ids` hides samples of one row from each other (and leaves
        positions running on: rotary embedding is relative); negative ids are padding. `valid`, in its place, is for rows of one
        sample padded at their end: True where a token is none, and nothing needs to be hidden, since attention is causal. Padding,
        and an MTP position whose next tokens are another sample's, count neither in `expert_counts` nor in `balance_loss`.
        `recompute` rebuilds RMSNorm, MLA up-projections and SwiGLU in backward ("selective", V3 section 3.2.3) or whole blocks
        ("full"). Under autocast the residual stream is low-precision."""
        assert document_ids is None or valid is None, "packed rows have document_ids, padded rows have valid"
        mask = None if document_ids is None else document_mask(document_ids)
        documents = document_ids
        if valid is not None:
            documents = torch.arange(len(valid), device=valid.device).unsqueeze(1).where(valid, -1)
        rotary = Rotary(*rotary_table(self.config, torch.arange(input_ids.shape[1], device=input_ids.device)))
        embedded = self.embed(input_ids)
        attend = causal_attention if mask is None else partial(causal_attention, mask=mask)
        hidden, of_main = self._main(embedded, rotary, attend, recompute)
        routings: list[tuple[Routing, Tensor | None]] = [(routing, documents) for routing in of_main]
        mtp_hidden: list[Tensor] = []
        for depth, module in enumerate(self.mtp_modules if mtp else []):
            previous = mtp_hidden[-1] if mtp_hidden else hidden
            length = input_ids.shape[1] - 1 - depth
            if length < 1:
                break
            combined = module.combine(previous[:, :length], embedded[:, depth + 1 :])
            cut = Rotary(rotary.cos[:length], rotary.sin[:length])
            attend = causal_attention if mask is None else partial(causal_attention, mask=mask[:, :, :length, :length])
            x, routing = _run(module, combined, cut, attend, recompute)
            mtp_hidden.append(module.shared_head.norm(x))
            if routing is not None:
                routings.append((routing, None if documents is None else _within(documents, depth + 1)))
        counts, balance = self._balance(routings, input_ids, documents)
        if (
            mtp and len(mtp_hidden) < self.config.num_nextn_predict_layers
        ):  # the sequences end before the deeper predictions begin
            missing = self.config.num_nextn_predict_layers - len(mtp_hidden)
            mtp_hidden += [hidden[:, :0]] * missing
            counts = F.pad(counts, (0, 0, 0, missing))
        return TrainOutput(hidden, mtp_hidden, counts, balance)

    def samples_forward(
        self,
        input_ids: Int[Tensor, "N"],
        prefixes: SharedPrefixes,
        times: Int[Tensor, "depths_1 N"],
        following: Int[Tensor, "depths N"],
        *,
        chosen: Int[Tensor, "layers N K"] | None = None,
    ) -> SamplesOutput:
        """Hidden states of samples that share prompts, for reinforcement learning. `following[k]` holds the token that stands k + 1
        after each, for the MTP depths that are computed; no gradient goes from them into what they read. `times[0]` tells how often a
        token counts in `expert_counts`, and `times[1 + k]` in that of depth k. `chosen` holds the experts that each
        MoE layer of the main model is to take, -1 where the router chooses."""
        rotary = Rotary(*rotary_table(self.config, prefixes.positions.unsqueeze(0)))
        given = None if chosen is None else chosen.unsqueeze(1)
        hidden, routings = self._main(self.embed(input_ids.unsqueeze(0)), rotary, prefixes.attend, "none", given)
        counts = [_counts(routing, times[0], self.config.n_routed_experts) for routing in routings]
        previous, mtp_hidden = hidden.detach(), list[Tensor]()
        for depth, (module, ids) in enumerate(zip(self.mtp_modules, following, strict=False)):
            combined = module.combine(previous, self.embed(ids.unsqueeze(0)).detach())
            x, routing = _run(module, combined, rotary, prefixes.attend, "none")
            previous = module.shared_head.norm(x)
            mtp_hidden.append(previous[0])
            if routing is not None:
                counts.append(_counts(routing, times[1 + depth], self.config.n_routed_experts))
        empty = input_ids.new_zeros(0, self.config.n_routed_experts)
        return SamplesOutput(hidden[0], mtp_hidden, torch.stack(counts) if counts else empty)

    def _main(
        self, embedded: Tensor, rotary: Rotary, attend: Attend, recompute: Recompute, chosen: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """The main model: hidden states after the final norm, and what its routers did."""
        x, routings = embedded, list[Routing]()
        for layer, block in enumerate(self.blocks):
            given = None if chosen is None or isinstance(block.mlp, MLP) else chosen[layer - self.config.first_k_dense_replace]
            x, routing = _run(block, x, rotary, attend, recompute, given)
            if routing is not None:
                routings.append(routing)
        return self.model.norm(x), routings

    def _balance(
        self, routings: list[tuple[Routing, Tensor | None]], input_ids: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Expert counts int64 [routers, E] and the summed balance terms; each routing comes with the document of each of its tokens,
        negative where a token does not count."""
        n_experts, top_k = self.config.n_routed_experts, self.config.num_experts_per_tok
        if not routings:
            return input_ids.new_zeros(0, n_experts), torch.zeros((), device=input_ids.device)
        if documents is None:
            counts = [torch.bincount(routing.indices.flatten(), minlength=n_experts) for routing, _ in routings]
            terms = [sequence_balance(routing.scores, input_ids.shape[0], top_k) for routing, _ in routings]
            return torch.stack(counts), torch.stack(terms).sum()
        present = max(1, documents[documents >= 0].unique().numel())
        num_documents = max(1, int(documents.max()) + 1)
        counts, terms = [], []
        for routing, own in routings:
            assert own is not None
            flat = own.flatten()
            indices = routing.indices.where(flat.unsqueeze(1) >= 0, n_experts)  # what does not count goes to one expert too many
            counts.append(torch.bincount(indices.flatten(), minlength=n_experts + 1)[:n_experts])
            terms.append(document_balance(routing.scores, flat, num_documents, top_k))
        return torch.stack(counts), torch.stack(terms).sum() / present

    def embed(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        embedded = F.embedding(input_ids, self.model.embed_tokens.weight)
        device = embedded.device.type
        return embedded.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embedded


def _within(documents: Tensor, ahead: int) -> Tensor:
    """The document of each position whose token `ahead` further is of the same one, else -1: [B, T] -> [B, T - ahead]."""
    here, there = documents[:, :-ahead], documents[:, ahead:]
    return here.where(here == there, -1)


def _counts(routing: Routing, times: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each expert was chosen, a token's choices as often as `times` [N] says."""
    chosen = routing.indices.flatten()
    return torch.bincount(chosen, times.repeat_interleave(len(chosen) // len(times)), minlength=num_experts).long()


def _run(
    block: Block, x: Tensor, rotary: Rotary, attend: Attend, recompute: Recompute, chosen: Tensor | None = None
) -> tuple[Tensor, Routing | None]:
    if recompute == "full" and torch.is_grad_enabled():
        result: tuple[Tensor, Routing | None] = checkpoint(
            block, x, rotary, attend, False, chosen, use_reentrant=False, preserve_rng_state=False
        )
        return result
    return block(x, rotary, attend, recompute == "selective", chosen)  # type: ignore[no-any-return]


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """normal(0, initializer_range) for every matrix, ones for norms, zero biases (V3 section 4.2); the same on any device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            values = torch.empty(parameter.shape).normal_(0.0, model.config.initializer_range, generator=generator)
            parameter.copy_(values)
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.zero_()
