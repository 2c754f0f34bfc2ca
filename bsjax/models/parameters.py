"""How Hugging Face parameters map to ours: one rule per parameter, one dictionary of transforms.

The tables are in each family's `parameters.py`. Source names are those of the nested layout that
transformers 5 saves; `canonical_key` maps the hub's older layouts to it.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from bsjax.models.sharding import KV_HEADS, MLP, Q_HEADS, VOCABULARY

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
      source: the canonical Hugging Face key, containing `{layer}` for a stacked parameter.
      layers: how many source tensors are stacked on a leading axis, or None for a single one.
      transform: a key of `TRANSFORMS`, applied to each source tensor.
      axes: the logical axes of our parameter that are divided among devices
        (`bsjax.models.sharding`), without that of layers; None for those that are not, and () if
        none is.
    """

    target: tuple[str, ...]
    source: str
    layers: int | None
    transform: str
    axes: tuple[str | None, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The canonical keys that this parameter is made from, in stacking order."""
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
    # Unchanged: norms, biases, embeddings.
    "copy": _copy,
    # A linear layer's [out, in] to our [in, out].
    "transpose": _transpose,
    # A patch convolution's [out, channels, ...] to the [channels * ..., out] of a linear layer.
    "flatten_patch": _flatten_patch,
}


def canonical_key(key: str) -> str:
    """The key of a parameter in the nested layout, given its key in any layout.

    Layouts on the hub: `visual.*` with `model.layers.*`; `language_model.model.*` with
    `language_model.lm_head.*`; `model.visual.*` with `model.language_model.*`; and Gemma 3's
    `vision_tower.*` and `multi_modal_projector.*`, with or without `model.` in front and
    `vision_model.` inside. Other keys are returned unchanged.
    """
    for prefix, canonical in _PREFIXES:
        if key.startswith(prefix):
            return canonical + key.removeprefix(prefix)
    return key


def ties_embeddings(config: PretrainedConfig) -> bool:
    """Whether the output projection is the embedding table.

    Read from the top level of the config. Some of Qwen's files have it in `text_config`;
    transformers moves it to the top level when it reads them.
    """
    return bool(config.tie_word_embeddings)


def tied_keys(config: PretrainedConfig) -> dict[str, str]:
    """Maps canonical keys whose tensors may be copies in a checkpoint to the keys they copy."""
    if not ties_embeddings(config):
        return {}
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def linear_rules(
    target: tuple[str, ...],
    source: str,
    *,
    bias: bool,
    layers: int | None = None,
    axes: tuple[str | None, str | None] = (None, None),
) -> list[ParameterRule]:
    """The rules of a linear layer: its kernel [inputs, outputs], and its bias if there is one.

    Args:
      target: path of the layer in the module's state.
      source: the canonical Hugging Face prefix.
      bias: whether there is a bias.
      layers: as for `ParameterRule`.
      axes: the logical axes of inputs and outputs.
    """
    rules = [ParameterRule((*target, "kernel"), f"{source}.weight", layers, "transpose", axes)]
    if bias:
        rules.append(ParameterRule((*target, "bias"), f"{source}.bias", layers, "copy", axes[1:]))
    return rules


_LANGUAGE_LINEARS: dict[str, tuple[str | None, str | None]] = {
    "self_attn.q_proj": (None, Q_HEADS),
    "self_attn.k_proj": (None, KV_HEADS),
    "self_attn.v_proj": (None, KV_HEADS),
    "self_attn.o_proj": (Q_HEADS, None),
    "mlp.gate_proj": (None, MLP),
    "mlp.up_proj": (None, MLP),
    "mlp.down_proj": (MLP, None),
}
"""The linear layers of a decoder layer, and the logical axes of their inputs and outputs."""


def decoder_linear_rules(layers: int, biases: Collection[str]) -> list[ParameterRule]:
    """The rules of the linear layers of every language model.

    Args:
      layers: how many decoder layers there are.
      biases: which of the linear layers have biases, such as "q_proj".
    """
    rules = []
    for name, axes in _LANGUAGE_LINEARS.items():
        part, linear = name.split(".")
        rules += linear_rules(
            ("language_model", "layers", part, linear),
            f"model.language_model.layers.{{layer}}.{name}",
            bias=linear in biases,
            layers=layers,
            axes=axes,
        )
    return rules


EMBEDDING = ParameterRule(
    ("language_model", "embed_tokens", "embedding"),
    "model.language_model.embed_tokens.weight",
    None,
    "copy",
    (VOCABULARY, None),
)
"""The embedding table of every language model."""


def output_rules(config: PretrainedConfig) -> list[ParameterRule]:
    """The rules of the output projection: none if it is tied to the embedding table."""
    if ties_embeddings(config):
        return []
    return linear_rules(("lm_head",), "lm_head", bias=False, axes=(None, VOCABULARY))


def norm_rules(
    targets: Iterable[str], prefix: tuple[str, ...], source: str, *, bias: bool, layers: int | None
) -> list[ParameterRule]:
    """The rules of norms with the same names on both sides: scales, and biases if there are any."""
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
