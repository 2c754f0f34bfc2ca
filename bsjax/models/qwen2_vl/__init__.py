"""Qwen2-VL. Qwen2.5-VL shares its language model, positions, prompts and outer model."""
