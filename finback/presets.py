"""Model sizes with their training recipes, as functions that return dataclasses: change a copy with `dataclasses.replace`."""

from collections.abc import Callable
from dataclasses import replace

from finback.config import ModelConfig, RopeScaling
from finback.train.config import PretrainConfig


def tiny() -> PretrainConfig:
    """V3's whole architecture at 4.8M active parameters: minutes on two CPU cores."""
    model = ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        max_position_embeddings=2048,
        q_lora_rank=128,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        initializer_range=0.02,
        pad_token_id=2,
    )
    # Small batches: at a million tokens, halving the batch still gains more than it costs in speed. Gamma is above V3's, because there
    # are hundreds of steps here and not hundreds of thousands.
    return PretrainConfig(
        model=model,
        steps=1500,
        global_batch_size=8,
        micro_batch_size=8,
        lr=3e-3,
        min_lr=3e-4,
        final_lr=1e-4,
        warmup_steps=60,
        bias_update_speed=0.003,
    )


def nano() -> PretrainConfig:
    """V3's whole architecture at 1M active parameters, for the quickstart: the R1 ladder in minutes on two CPU cores."""
    model = replace(
        micro().model,
        hidden_size=128,
        intermediate_size=320,
        moe_intermediate_size=64,
        q_lora_rank=64,
        initializer_range=0.05,  # after one or two million tokens, what begins with larger weights is ahead
    )
    return replace(micro(), model=model)


def micro() -> PretrainConfig:
    """The same at 2M active parameters, for `finback r1 small`."""
    model = replace(
        tiny().model,
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=480,
        moe_intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        q_lora_rank=96,
    )
    return replace(tiny(), model=model, min_lr=3e-4, final_lr=1e-4)


def nano_dense() -> PretrainConfig:
    """A dense Qwen3 of 0.5M parameters: the student of the quickstart."""
    model = ModelConfig(
        model_type="qwen3",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    return replace(tiny_dense(), model=model)


def tiny_dense() -> PretrainConfig:
    """A dense Llama with as many parameters as `tiny` uses per token: what experts and latents are measured against."""
    model = ModelConfig(
        model_type="llama",
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.02,
        pad_token_id=2,
    )
    return replace(tiny(), model=model, bias_update_speed=0.0, balance_loss_coef=0.0, mtp_loss_coef=0.0, final_mtp_loss_coef=0.0)


def small() -> PretrainConfig:
    """The same at about 100M parameters in all, 35M active: hours on one GPU."""
    model = ModelConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1536,
        moe_intermediate_size=192,
        num_hidden_layers=9,
        num_attention_heads=8,
        n_routed_experts=32,
        num_experts_per_tok=4,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=4096,
        q_lora_rank=256,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        initializer_range=0.02,
        pad_token_id=2,
    )
    return PretrainConfig(
        model=model,
        steps=20_000,
        sequence_length=1024,
        global_batch_size=128,
        micro_batch_size=32,
        lr=1e-3,
        min_lr=1e-4,
        final_lr=3.3e-5,
        warmup_steps=500,
        ema_decay=0.999,
        eval_every=500,
        eval_sequences=256,
        save_every=1000,
    )


def v2_lite_16b() -> PretrainConfig:
    """DeepSeek-V2-Lite as published, with its recipe (V2 appendix B.1).

    Its learning rate falls by two factors of 0.316, at about 80% and 90% of the tokens: a cosine of length 0. Its balance loss is
    V2's expert-level one, whose weight stands here with V3's sequence-wise form.
    """
    model = ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
        n_shared_experts=2,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
        initializer_range=0.006,
        bos_token_id=100000,
        eos_token_id=100001,
        torch_dtype="bfloat16",
        model_type="deepseek_v2",
    )
    return PretrainConfig(
        model=model,
        tokens=5_700_000_000_000,
        sequence_length=4096,
        global_batch_size=4608,
        micro_batch_size=1,
        lr=4.2e-4,
        min_lr=4.2e-4 * 0.316,
        final_lr=4.2e-4 * 0.316**2,
        warmup_steps=2000,
        lr_constant_tokens=4_560_000_000_000,
        lr_decay_tokens=0,
        lr_tail_tokens=570_000_000_000,
        bias_update_speed=0.0,
        balance_loss_coef=0.001,
        mtp_loss_coef=0.0,
        final_mtp_loss_coef=0.0,
        moments_dtype="bf16",
        recompute="selective",
        eval_every=1000,
        save_every=1000,
    )


def v3_671b() -> PretrainConfig:
    """DeepSeek-V3 as published, with its recipe (V3 section 4.2): for planning, and to read the ramps where they were used.

    Every number is the paper's, but for those that it does not give: the EMA's decay, AdamW's epsilon and the micro-batch are ours. The
    published config.json says `initializer_range` 0.02; the paper trained with 0.006, which stands here. The file also carries
    the YaRN of the later long-context extension; the 4K pre-training itself ran without.
    """
    model = ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
        q_lora_rank=1536,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        rope_scaling=RopeScaling(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
        initializer_range=0.006,
        torch_dtype="bfloat16",
        fp8=True,
    )
    return PretrainConfig(
        model=model,
        tokens=14_800_000_000_000,
        sequence_length=4096,
        global_batch_size=15360,
        initial_batch_size=3072,
        batch_ramp_tokens=469_000_000_000,
        micro_batch_size=1,
        lr=2.2e-4,
        min_lr=2.2e-5,
        final_lr=7.3e-6,
        warmup_steps=2000,
        lr_constant_tokens=10_000_000_000_000,
        lr_decay_tokens=4_300_000_000_000,
        lr_tail_tokens=333_000_000_000,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        moments_dtype="bf16",
        bias_update_speed=0.001,
        bias_update_tokens=14_300_000_000_000,
        balance_loss_coef=0.0001,
        mtp_loss_coef=0.3,
        final_mtp_loss_coef=0.1,
        mtp_loss_switch_tokens=10_000_000_000_000,
        recompute="selective",
        ema_decay=0.999,
        eval_every=1000,
        save_every=1000,
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "nano": nano,
    "nano-dense": nano_dense,
    "micro": micro,
    "tiny": tiny,
    "tiny-dense": tiny_dense,
    "small": small,
    "v2-lite-16b": v2_lite_16b,
    "v3-671b": v3_671b,
}
"""The presets by the names of the command line."""
