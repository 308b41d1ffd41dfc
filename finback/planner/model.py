"""What a model costs per token by arithmetic: parameters, FLOPs and bytes by module, and its cache against those of other designs."""

from dataclasses import dataclass, replace

from finback.config import InputError, ModelConfig, count_params

GQA_GROUPS = 8
PUBLISHED_CACHES = (
    # name, layers, key-value heads, head size, published bytes (V3 hardware paper, table 1)
    ("Qwen2.5-72B (GQA)", 80, 8, 128),
    ("LLaMA-3.1-405B (GQA)", 126, 8, 128),
)
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0 + 4 / 128**2, "int4": 0.5 + 2 / 128}
"""Bytes of one weight: FP8 with a float per 128 x 128 block (V3 section 3.3.2), int4 with a half per 128."""


@dataclass(frozen=True)
class Module:
    """One part of the model, all its layers together. `parameters` are those that exist, `active_parameters` those that one token
    uses, `forward_flops_per_token` twice the multiplications of its matrix products, `decode_bytes_per_token` what one token alone
    reads when decoded behind as many as the sequence has: weights in bf16, one row of the embedding, and the cache in bf16."""

    name: str
    parameters: int
    active_parameters: int
    forward_flops_per_token: float
    decode_bytes_per_token: float = 0.0


@dataclass(frozen=True)
class Shape:
    """Parameters of one layer's parts, from which everything else is summed."""

    attention: int
    attention_expand: int
    """The part of attention that expands latents: recomputed in backward (V3 section 3.2.3)."""
    dense: int
    expert: int
    router: int
    embedding: int


def attention_matrices(c: ModelConfig) -> list[tuple[int, int]]:
    """Inner and outer width of each of attention's projections in one layer; of MLA, those that expand latents stand last."""
    heads, width = c.num_attention_heads, c.hidden_size
    if not c.kv_lora_rank:
        keys = c.num_key_value_heads * c.head_dim
        return [(width, heads * c.head_dim), (width, keys), (width, keys), (heads * c.head_dim, width)]
    plain = [(width, c.kv_lora_rank + c.qk_rope_head_dim), (heads * c.v_head_dim, width)]
    expand = [(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))]
    if c.q_lora_rank is None:
        return [(width, heads * c.qk_head_dim), *plain, *expand]
    return [(width, c.q_lora_rank), *plain, (c.q_lora_rank, heads * c.qk_head_dim), *expand]


def shape(c: ModelConfig) -> Shape:
    """Matrix parameters of one layer, norms and biases left out."""
    width, matrices = c.hidden_size, attention_matrices(c)
    expanding = 0 if not c.kv_lora_rank else 1 if c.q_lora_rank is None else 2
    return Shape(
        attention=sum(inner * outer for inner, outer in matrices),
        attention_expand=sum(inner * outer for inner, outer in matrices[len(matrices) - expanding :]),
        dense=3 * width * c.intermediate_size,
        expert=3 * width * c.moe_intermediate_size,
        router=width * c.n_routed_experts,
        embedding=c.vocab_size * width,
    )


def attention_core_flops(c: ModelConfig, context: float) -> float:
    """FLOPs of scores and weighted values of one token over `context` earlier ones, one layer, heads expanded."""
    value_width = c.v_head_dim if c.kv_lora_rank else c.head_dim
    return 2.0 * c.num_attention_heads * (c.qk_head_dim + value_width) * context


def absorbed_core_flops(c: ModelConfig, context: float) -> float:
    """The same in decoding: MLA scores latents themselves (V3 section 2.1.1), others attend as always."""
    if not c.kv_lora_rank:
        return attention_core_flops(c, context)
    return 2.0 * c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) * context


def modules(c: ModelConfig, sequence_length: int) -> list[Module]:
    """Every part of the main model and its MTP layers; attention is causal, so a token sees half of the others."""
    s = shape(c)
    layers, moe, picks = c.num_hidden_layers, c.num_moe_layers, c.num_experts_per_tok
    core = attention_core_flops(c, (sequence_length + 1) / 2)
    found = [
        Module("embedding", s.embedding, s.embedding, 0.0),
        Module("attention projections", layers * s.attention, layers * s.attention, 2.0 * layers * s.attention),
        Module("attention scores and values", 0, 0, layers * core),
        Module(
            "dense FFN",
            c.first_k_dense_replace * s.dense,
            c.first_k_dense_replace * s.dense,
            2.0 * c.first_k_dense_replace * s.dense,
        ),
    ]
    if c.n_routed_experts:
        routed, shared = moe * c.n_routed_experts * s.expert, moe * c.n_shared_experts * s.expert
        active = moe * picks * s.expert
        found += [
            Module("router", moe * s.router, moe * s.router, 2.0 * moe * s.router),
            Module("routed experts", routed, active, 2.0 * active),
            Module("shared experts", shared, shared, 2.0 * shared),
        ]
    head = 0 if c.tie_word_embeddings else s.embedding
    found.append(Module("output head", head, head, 2.0 * s.embedding))
    if c.num_nextn_predict_layers:
        joined = 2 * c.hidden_size**2
        own = s.attention + joined + s.router
        total = own + (c.n_routed_experts + c.n_shared_experts) * s.expert
        active = own + (picks + c.n_shared_experts) * s.expert
        flops = 2.0 * (active + s.embedding) + core
        depth = c.num_nextn_predict_layers
        found.append(Module("MTP layers", depth * total, depth * active, depth * flops))
    return [replace(module, decode_bytes_per_token=_decode_bytes(c, module, sequence_length)) for module in found]


def _decode_bytes(c: ModelConfig, module: Module, sequence_length: int) -> float:
    match module.name:
        case "embedding":
            return 2.0 * c.hidden_size
        case "attention scores and values":
            return sequence_length * cache_bytes_per_token(c)
        case "output head":
            return 2.0 * c.vocab_size * c.hidden_size  # that of the embedding where they are tied
        case _:
            return 2.0 * module.active_parameters


def training_flops_per_token(c: ModelConfig, sequence_length: int, *, mtp: bool = True) -> float:
    """Forward and backward: three times the forward products; recomputation is no useful work and not counted."""
    return 3.0 * sum(m.forward_flops_per_token for m in modules(c, sequence_length) if mtp or m.name != "MTP layers")


def cache_bytes_per_token(c: ModelConfig, *, bytes_per_value: float = 2.0, mtp: bool = False) -> float:
    """Bytes that one cached token takes over all layers."""
    layers = c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)
    return c.cache_row_width * layers * bytes_per_value


@dataclass(frozen=True)
class CacheRow:
    """One design's cache, against the model's own."""

    name: str
    bytes_per_token: float
    times_ours: float


def cache_table(c: ModelConfig) -> list[CacheRow]:
    """The model's cache in bf16, the same layers and heads with MHA, GQA of 8 groups and MQA ("2 n d" values each), and
    published models."""
    own = cache_bytes_per_token(c)
    head = c.v_head_dim if c.kv_lora_rank else c.head_dim
    kind = "MLA" if c.kv_lora_rank else "MHA" if c.num_key_value_heads == c.num_attention_heads else "GQA"
    rows = [(f"this model ({kind})", own)]
    for name, groups in (("MHA", c.num_attention_heads), (f"GQA of {GQA_GROUPS}", GQA_GROUPS), ("MQA", 1)):
        rows.append((f"the same with {name}", 4.0 * c.num_hidden_layers * min(groups, c.num_attention_heads) * head))
    rows += [(name, 4.0 * layers * groups * size) for name, layers, groups, size in PUBLISHED_CACHES]
    return [CacheRow(name, size, size / own) for name, size in rows]


@dataclass(frozen=True)
class ModelPlan:
    """`finback plan model`: sizes and costs per token. FLOPs are of one token at `sequence_length`; weights read are those that one
    token uses, in the named precision."""

    sequence_length: int
    total_parameters: int
    active_parameters: int
    active_parameters_without_embedding: int
    mtp_parameters_stored: int
    training_gflop_per_token: float
    training_gflop_per_token_without_mtp: float
    forward_gflop_per_token: float
    decode_gflop_per_token: float
    weight_gb: dict[str, float]
    active_weight_gb_per_token: dict[str, float]
    cache_bytes_per_token: float
    cache_bytes_per_token_with_mtp: float
    cache_gib_at_full_context: float
    max_position_embeddings: int
    modules: list[Module]
    caches: list[CacheRow]


def plan_model(c: ModelConfig, sequence_length: int = 4096) -> ModelPlan:
    """Everything that follows from the configuration alone."""
    if sequence_length < 1:
        raise InputError(f"--sequence-length is {sequence_length}, it must be at least 1")
    if sequence_length > c.max_position_embeddings:
        limit = c.max_position_embeddings
        raise InputError(
            f"--sequence-length is {sequence_length}, above the model's max_position_embeddings; use at most {limit}"
        )
    counts, parts = count_params(c), modules(c, sequence_length)
    main = [m for m in parts if m.name != "MTP layers"]
    decode = sum(m.forward_flops_per_token for m in main if not m.name.startswith("attention scores"))
    decode += c.num_hidden_layers * absorbed_core_flops(c, sequence_length)
    without_embedding = counts.active - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    return ModelPlan(
        sequence_length=sequence_length,
        total_parameters=counts.total,
        active_parameters=counts.active,
        active_parameters_without_embedding=without_embedding,
        mtp_parameters_stored=counts.mtp,
        training_gflop_per_token=training_flops_per_token(c, sequence_length) / 1e9,
        training_gflop_per_token_without_mtp=training_flops_per_token(c, sequence_length, mtp=False) / 1e9,
        forward_gflop_per_token=sum(m.forward_flops_per_token for m in main) / 1e9,
        decode_gflop_per_token=decode / 1e9,
        weight_gb={name: counts.total * size / 1e9 for name, size in WEIGHT_BYTES.items()},
        active_weight_gb_per_token={name: without_embedding * size / 1e9 for name, size in WEIGHT_BYTES.items()},
        cache_bytes_per_token=cache_bytes_per_token(c),
        cache_bytes_per_token_with_mtp=cache_bytes_per_token(c, mtp=True),
        cache_gib_at_full_context=cache_bytes_per_token(c) * c.max_position_embeddings / 2**30,
        max_position_embeddings=c.max_position_embeddings,
        modules=parts,
        caches=cache_table(c),
    )
