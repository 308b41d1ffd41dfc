"""Steps on a CPU by the C kernels of `ops.native`: the whole step for a given number of rows is prepared once, as a list of calls
that are bound to their tensors, and then runs without Python in between.

A row is one token of some sequence. Rows of one sequence (verified drafts, a piece of a prompt) share a block table: in each layer all
of them are cached before any attends. MLA is absorbed throughout, also for prompts: on a CPU, at 512 tokens, that takes from half to
the same time as expanding by torch does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finback.engine.batch import Chunk
from finback.model.gqa import GQA
from finback.model.layers import MLP, Linear, RMSNorm
from finback.model.mla import LATENT_NORM_EPS, MLA, Rotary
from finback.model.transformer import Block, Transformer
from finback.ops.compressed import CompressedRows
from finback.ops.native.arguments import CachedRows, Choice, Matrix, Norm, Projected, RotaryTable, Routing, Weights
from finback.ops.native.calls import Call, Kernels

DTYPES = (torch.float32, torch.bfloat16)
KEPT_STEPS = 128  # prepared steps, one for each number of rows


class Step(NamedTuple):
    """A prepared step for some number of rows, and the tensor that it ends with."""

    run: Callable[[], object]
    output: Tensor  # [rows, D] after the final norm, or [rows, vocab]


class NativeDecoder:
    """Rows of tokens through the model, and through its MTP module. Weights are used where they lie: changed in place (by a training
    step, say), they count from the next step on. Packed ones are multiplied with as they are."""

    def __init__(
        self,
        kernels: Kernels,
        model: Transformer,
        cache: Tensor,
        rotary: Rotary,
        max_rows: int,
        max_head_rows: int,
        blocks_per_sequence: int,
        record_experts: bool = False,
        layout: CompressedRows | None = None,
    ) -> None:
        self.max_rows, self.max_head_rows = max_rows, max_head_rows
        self._kernels, self._model, self._cache, self._layout = kernels, model, cache, layout
        self._rotary = RotaryTable(*rotary)
        self._ids = torch.zeros(max_rows, dtype=torch.int64)
        self._positions = torch.zeros(max_rows, dtype=torch.int64)
        self._tables = torch.zeros(max_rows, blocks_per_sequence, dtype=torch.int32)
        self._tables_now: list[Sequence[int]] = [()] * max_rows
        self._ids_array, self._positions_array, self._tables_array = (
            t.numpy() for t in (self._ids, self._positions, self._tables)
        )
        self._scratch = _Scratch(model, max_rows, max_head_rows, record_experts)
        self._steps: dict[int, Step] = {}
        self._draft_steps: dict[int, Step] = {}
        self._heads: dict[int, Step] = {}
        self._own_heads: dict[int, Step] = {}

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute `chunks`, of at most `max_rows` tokens together: hidden states [rows, D], overwritten by the next call."""
        rows = self._place(chunks)
        step = self._steps.get(rows) or _kept(self._steps, rows, self._prepare(rows))
        step.run()
        return step.output

    def chosen(self, rows: int) -> Tensor:
        """The experts int64 [rows, layers, K] that the last `forward`, of `rows` rows, took in each MoE layer; only with
        `record_experts`."""
        return torch.stack(self._scratch.first(rows).chosen, dim=1)

    def forget(self) -> None:
        """Prepare all steps anew when they are next needed: parameters may have moved in memory."""
        for steps in (self._steps, self._draft_steps, self._heads, self._own_heads):
            steps.clear()

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, D] -> float32 [rows, vocab], overwritten by the next call; at most `max_head_rows` rows."""
        rows = len(hidden)
        assert hidden.is_contiguous()
        if hidden.data_ptr() == self._scratch.hidden.data_ptr():  # the first rows of the last step: read where they lie
            step = self._own_heads.get(rows) or _kept(
                self._own_heads, rows, self._prepare_head(rows, self._scratch.hidden[:rows])
            )
        else:
            step = self._heads.get(rows) or _kept(self._heads, rows, self._prepare_head(rows, self._scratch.head[:rows]))
            self._scratch.head[:rows] = hidden
        step.run()
        return step.output

    def _place(self, chunks: Sequence[Chunk]) -> int:
        """Put tokens, positions and block tables where the prepared steps look for them; returns the number of rows."""
        ids: list[int] = []
        positions: list[int] = []
        row = 0
        for token_ids, start, table in chunks:
            ids += token_ids
            positions += range(start, start + len(token_ids))
            for _ in token_ids:
                if self._tables_now[row] != table:
                    self._tables_array[row, : len(table)] = table
                    self._tables_now[row] = list(table)
                row += 1
        self._ids_array[:row] = ids
        self._positions_array[:row] = positions
        return row

    def draft(self, chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
        """The MTP module over `chunks` that hold, at the positions of `hidden` [rows, D], the tokens that follow them: hidden states
        as `forward` gives them."""
        rows = self._place(chunks)
        self._scratch.previous[:rows] = hidden
        step = self._draft_steps.get(rows) or _kept(self._draft_steps, rows, self._prepare_draft(rows))
        step.run()
        return step.output

    def _prepare(self, rows: int) -> Step:
        model, buffers = self._model, self._scratch.first(rows)
        calls = [self._kernels.embedding(self._ids[:rows], model.model.embed_tokens.weight.data, buffers.x)]
        chosen = iter(buffers.chosen)
        for block, cache in zip(model.blocks, self._cache, strict=False):
            kept = buffers.indices if isinstance(block.mlp, MLP) else next(chosen, buffers.indices)
            calls += self._block(block, cache, buffers, kept)
        calls.append(self._kernels.rms_norm(buffers.x, _norm(model.model.norm), buffers.hidden))
        return Step(self._kernels.program(calls), buffers.hidden)

    def _prepare_head(self, rows: int, hidden: Tensor) -> Step:
        logits = self._scratch.logits[:rows]
        return Step(self._kernels.linear(hidden, [_matrix(self._model.lm_head)], [logits]), logits)

    def _prepare_draft(self, rows: int) -> Step:
        model, buffers = self._model, self._scratch.first(rows)
        module, size = model.mtp_modules[0], model.config.hidden_size
        joined, embedded = buffers.joined, buffers.hidden
        norms = [
            self._kernels.embedding(self._ids[:rows], model.model.embed_tokens.weight.data, embedded),
            self._kernels.rms_norm(embedded, _norm(module.enorm), embedded),
            self._kernels.rms_norm(buffers.previous, _norm(module.hnorm), buffers.previous),
        ]
        calls = [self._kernels.linear(joined, [_matrix(module.eh_proj)], [buffers.x])]
        calls += self._block(module, self._cache[-1], buffers, buffers.indices)
        calls.append(self._kernels.rms_norm(buffers.x, _norm(module.shared_head.norm), buffers.hidden))
        normalise, rest = self._kernels.program(norms), self._kernels.program(calls)

        def run() -> None:
            normalise()
            joined[:, :size] = embedded
            joined[:, size:] = buffers.previous
            rest()

        return Step(run, buffers.hidden)

    def _block(self, block: Block, cache: Tensor, buffers: "_Scratch", indices: Tensor) -> list[Call]:
        """One layer: buffers.x becomes its output, and `indices` the experts that it takes, if it has any."""
        attention, x = block.self_attn, buffers.x
        if isinstance(attention, MLA):
            calls = self._latent_attention(attention, cache, buffers, _norm(block.input_layernorm))
        else:
            calls = self._grouped_query_attention(attention, cache, buffers, _norm(block.input_layernorm))
        output = attention.o_proj
        calls.append(self._kernels.linear(buffers.heads, [_matrix(output)], [x], residual=x, biases=[_bias(output)]))
        return [*calls, self._feed_forward(block, buffers, indices)]

    def _latent_attention(self, attention: MLA, cache: Tensor, buffers: "_Scratch", norm: Norm) -> list[Call]:
        """From the residual stream to buffers.heads, the new rows cached on the way."""
        a, rows = attention, len(buffers.x)
        compressed = _matrix(a.kv_a_proj_with_mqa)
        if a.q_proj is not None:
            outputs = [buffers.query, buffers.compressed]
            calls = [self._kernels.linear(buffers.x, [_matrix(a.q_proj), compressed], outputs, norm)]
        else:
            outputs = [buffers.compressed_query, buffers.compressed]
            calls = [self._kernels.linear(buffers.x, [_matrix(a.q_a_proj), compressed], outputs, norm)]
            query_norm = _norm(a.q_a_layernorm)
            calls.append(self._kernels.linear(buffers.compressed_query, [_matrix(a.q_b_proj)], [buffers.query], query_norm))
        projected = Projected(
            buffers.compressed,
            Norm(a.kv_a_layernorm.weight.data, LATENT_NORM_EPS),
            self._rotary,
            a.kv_b_proj.weight.data,
            a.nope_dim,
        )
        latents = CachedRows(cache, self._positions[:rows], self._tables[:rows], self._layout)
        query, heads = (t.view(rows, a.num_heads, -1) for t in (buffers.query, buffers.heads))
        calls.append(self._kernels.latent_attention(query, latents, heads, a.kv_lora_rank, a.scale, projected))
        return calls

    def _grouped_query_attention(self, attention: GQA, cache: Tensor, buffers: "_Scratch", norm: Norm) -> list[Call]:
        """The same for the dense students."""
        a, rows = attention, len(buffers.x)
        projections = (a.q_proj, a.k_proj, a.v_proj)
        outputs = [buffers.query, buffers.key, buffers.value]
        weights, biases = [_matrix(layer) for layer in projections], [_bias(layer) for layer in projections]
        cached = CachedRows(cache, self._positions[:rows], self._tables[:rows], self._layout)
        query_norm, key_norm = (None if layer is None else _norm(layer) for layer in (a.q_norm, a.k_norm))
        attend = self._kernels.grouped_query_attention(
            buffers.query, buffers.key, buffers.value, cached, self._rotary, buffers.heads, a.scale, query_norm, key_norm
        )
        return [self._kernels.linear(buffers.x, weights, outputs, norm, biases=biases), attend]

    def _feed_forward(self, block: Block, buffers: "_Scratch", indices: Tensor) -> Call:
        x, norm, mlp = buffers.x, _norm(block.post_attention_layernorm), block.mlp
        if isinstance(mlp, MLP):
            return self._kernels.feed_forward(x, x, norm=norm, residual=x, shared=_weights(mlp))
        c, gate, experts = self._model.config, mlp.gate, mlp.experts
        routing = Routing(
            gate.weight.data,
            gate.e_score_correction_bias,
            c.scoring_func,
            c.topk_method,
            c.n_group,
            c.topk_group,
            c.norm_topk_prob,
            c.routed_scaling_factor,
            buffers.scores,
        )
        return self._kernels.feed_forward(
            x,
            x,
            norm=norm,
            residual=x,
            routing=routing,
            choice=Choice(indices, buffers.values),
            experts=Weights(*experts.packed or (experts.gate_proj.data, experts.up_proj.data, experts.down_proj.data)),
            shared=_weights(mlp.shared_experts),
        )


class _Scratch:
    """What a step keeps between its calls, for the largest number of rows; `first` gives the same memory for fewer."""

    def __init__(self, model: Transformer, rows: int, head_rows: int, record_experts: bool) -> None:
        c, dtype = model.config, model.lm_head.weight.dtype
        heads = c.num_attention_heads

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype)

        self.x = new(c.hidden_size)
        self.hidden = new(c.hidden_size)
        self.head = torch.zeros(head_rows, c.hidden_size, dtype=dtype)
        self.logits = torch.zeros(head_rows, c.vocab_size)
        if c.kv_lora_rank:
            self.compressed = new(c.cache_row_width)
            self.compressed_query = new(c.q_lora_rank or 0)
            self.query = new(heads * c.qk_head_dim)
            self.heads = new(heads * c.v_head_dim)
        else:
            self.query = new(heads * c.head_dim)
            self.key = new(c.num_key_value_heads * c.head_dim)
            self.value = new(c.num_key_value_heads * c.head_dim)
            self.heads = new(heads * c.head_dim)
        self.scores = new(c.n_routed_experts, dtype=torch.float32)
        self.indices = new(c.num_experts_per_tok, dtype=torch.int64)
        layers = c.num_moe_layers if record_experts else 0
        self.chosen = tuple(
            new(c.num_experts_per_tok, dtype=torch.int64) for _ in range(layers)
        )  # instead of indices, to be read
        self.values = new(c.num_experts_per_tok, dtype=torch.float32)
        self.previous = new(c.hidden_size)  # MTP
        self.joined = new(2 * c.hidden_size)

    def first(self, rows: int) -> "_Scratch":
        part = object.__new__(_Scratch)
        for name, kept in self.__dict__.items():
            part.__dict__[name] = tuple(tensor[:rows] for tensor in kept) if isinstance(kept, tuple) else kept[:rows]
        return part


def _kept(steps: dict[int, Step], rows: int, step: Step) -> Step:
    """Remember a prepared step, and forget the oldest: prompts come in any length."""
    if len(steps) >= KEPT_STEPS:
        del steps[next(iter(steps))]
    steps[rows] = step
    return step


def _norm(layer: RMSNorm) -> Norm:
    return Norm(layer.weight.data, layer.eps)


def _matrix(layer: Linear) -> Matrix:
    """What W is multiplied from: itself, or packed."""
    return layer.weight.data if layer.packed is None else layer.packed


def _bias(layer: Linear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.data


def _weights(mlp: MLP) -> Weights:
    return Weights(_matrix(mlp.gate_proj), _matrix(mlp.up_proj), _matrix(mlp.down_proj))
