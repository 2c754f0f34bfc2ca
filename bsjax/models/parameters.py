"""How Hugging Face parameters map to ours: one rule per parameter, one dictionary of transforms.

The tables themselves stand in each family's `parameters.py`. Source names are those of the nested
layout that transformers 5 saves; `canonical_key` maps the older layouts of the hub to it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

_PREFIXES = (
    ("model.visual.", "model.visual."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.", "model.vision_tower."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
    ("model.language_model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)


@dataclass(frozen=True)
class ParameterRule:
    """Where one of our parameters comes from.

    Attributes:
      target: path in the module's state, e.g. `("language_model", "norm", "scale")`.
      source: the canonical Hugging Face key, with `{layer}` in it for a stacked parameter.
      layers: how many source tensors are stacked on a leading axis, or None for a single one.
      transform: a key of `TRANSFORMS`, applied to each source tensor.
    """

    target: tuple[str, ...]
    source: str
    layers: int | None
    transform: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The canonical keys this parameter is made from, in stacking order."""
        if self.layers is None:
            return (self.source,)
        return tuple(self.source.format(layer=layer) for layer in range(self.layers))


def _copy(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _transpose(tensor: np.ndarray) -> np.ndarray:
    return tensor.T


def _flatten_patch(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(tensor.shape[0], -1).T


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # As it is: norms, biases, embeddings.
    "copy": _copy,
    # A linear layer's [out, in] to our [in, out].
    "transpose": _transpose,
    # A patch convolution's [out, channels, ...] to the [channels * ..., out] of a linear layer.
    "flatten_patch": _flatten_patch,
}


def canonical_key(key: str) -> str:
    """The key that a parameter has in the nested layout, whichever layout `key` is of.

    The hub knows `visual.*` beside `model.layers.*`, `language_model.model.*` beside
    `language_model.lm_head.*`, and `model.visual.*` beside `model.language_model.*`; Gemma 3's
    `vision_tower.vision_model.*` and `multi_modal_projector.*`, with `model.` before them or not,
    and without `vision_model.`. Keys of none of these come back unchanged.
    """
    for prefix, canonical in _PREFIXES:
        if key.startswith(prefix):
            return canonical + key.removeprefix(prefix)
    return key


def ties_embeddings(config: PretrainedConfig) -> bool:
    """Whether the output projection is the embedding table.

    The top level of the config says it. Some files say it in `text_config`: transformers' classes
    of the families that have such files (Qwen's) bring it up when they read them.
    """
    return bool(config.tie_word_embeddings)


def tied_keys(config: PretrainedConfig) -> dict[str, str]:
    """Canonical keys that a checkpoint may hold as copies of others, and those others."""
    if not ties_embeddings(config):
        return {}
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def linear_rules(
    target: tuple[str, ...], source: str, *, bias: bool, layers: int | None = None
) -> list[ParameterRule]:
    """The rules of a linear layer: its kernel, and its bias if it has one."""
    rules = [ParameterRule((*target, "kernel"), f"{source}.weight", layers, "transpose")]
    if bias:
        rules.append(ParameterRule((*target, "bias"), f"{source}.bias", layers, "copy"))
    return rules


def norm_rules(
    targets: Iterable[str], prefix: tuple[str, ...], source: str, *, bias: bool, layers: int | None
) -> list[ParameterRule]:
    """The rules of norms named alike on both sides: their scales, and biases if they have them."""
    rules = []
    for name in targets:
        rules.append(
            ParameterRule((*prefix, name, "scale"), f"{source}.{name}.weight", layers, "copy")
        )
        if bias:
            rules.append(
                ParameterRule((*prefix, name, "bias"), f"{source}.{name}.bias", layers, "copy")
            )
    return rules
