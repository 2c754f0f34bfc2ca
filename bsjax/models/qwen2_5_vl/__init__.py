"""Qwen2.5-VL: Qwen2-VL with a vision tower most of whose blocks attend within windows."""
