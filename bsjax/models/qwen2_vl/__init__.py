"""Qwen2-VL. Qwen2.5-VL uses the same language model, positions, prompts and outer model."""
