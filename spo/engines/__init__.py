"""Rollout engines: the embedded one (`hf`, transformers alone) and vLLM, here or by address."""
