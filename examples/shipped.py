"""The trained model that comes with the repository: what examples and the evaluation start from."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "small-qwen2.5-vl"
"""In Hugging Face format, as `examples.train_small_vlm` writes it."""
PROFILE = "small-qwen2.5-vl"
"""The name of its profile among those of `profiles/`."""
