"""Attention FLOPs of a model's layers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerFlops:
    """Attention FLOPs of prefill in the layers of one kind.

    Attributes:
      bidirectional_images: whether an image's tokens all see each other there.
      window: how many positions back a query sees there, its own included; None for all.
      layers: how many layers are of the kind.
      dense: FLOPs if all their heads were dense.
      sparse: FLOPs with their heads' categories.
    """

    bidirectional_images: bool
    window: int | None
    layers: int
    dense: int
    sparse: int

    @property
    def name(self) -> str:
        """Which layers these are, in words."""
        layers = "layer" if self.layers == 1 else "layers"
        if self.window is None:
            return f"{self.layers} global {layers}"
        return f"{self.layers} {layers} with a window of {self.window}"
