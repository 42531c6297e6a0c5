"""A policy with random weights, of any size, for benchmarks of rollouts."""

from __future__ import annotations

import torch


def build_policy(
    folder: str,
    *,
    hidden: int,
    layers: int,
    vocabulary: int,
    context: int,
    kv_heads: int | None = None,
) -> int:
    """Save a Qwen2 policy with random weights; returns its number of parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for writing, one for reading, between the rows of a table
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads or max(hidden // 256, 1),
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())
