"""The language model of Gemma 3 (transformers: Gemma3TextModel).

There are two kinds of layers: local ones (with a sliding window) and global ones. Each kind has its
own visibility, rotary embedding and cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig
from typing_extensions import override

from bsjax.checks import positive_number
from bsjax.errors import CheckpointError
from bsjax.models.cache import Cache, CachedRows, OutputRows, Ring, ring_rows
from bsjax.models.collectives import embedded
from bsjax.models.config_checks import check_attention_heads, check_positive
from bsjax.models.language_model import LanguageModel
from bsjax.models.layers import (
    GatedMLP,
    KeepingAttend,
    LayerAttend,
    LayerStep,
    by_inputs,
    by_rows,
    chunk_attend,
    decode_attend,
    dot_general,
    frequencies,
    rotate,
    run_layer,
    scan_layers_of_kinds,
    stack_layers,
    take_rows,
)

LAYER_TYPES = ("sliding_attention", "full_attention")
"""The names of the kinds of layers in configs: local, global."""


def layer_kinds(config: PretrainedConfig) -> Int[np.ndarray, "layers"]:
    """0 for local layers, 1 for global ones: indices into `LAYER_TYPES`."""
    return np.asarray([LAYER_TYPES.index(each) for each in _layer_types(config)], np.int32)


def _layer_types(config: PretrainedConfig) -> list[str]:
    text = config.get_text_config()
    types = list(text.layer_types)
    if len(types) != text.num_hidden_layers or not set(types) <= set(LAYER_TYPES):
        raise CheckpointError(
            f"The config's layer_types must name one of {', '.join(LAYER_TYPES)} for each of its "
            f"{text.num_hidden_layers} layers, got {types}."
        )
    return types


def check_config(config: PretrainedConfig) -> None:
    """Rejects a text config that asks for something that the port does not support.

    Raises:
      CheckpointError: names the field.
    """
    if config.attn_logit_softcapping is not None:
        raise CheckpointError(
            f"The config asks for attn_logit_softcapping {config.attn_logit_softcapping}, which "
            "bsjax does not support; no published Gemma 3 model has it."
        )
    if config.use_bidirectional_attention:
        raise CheckpointError(
            "The config asks for use_bidirectional_attention, but an encoder cannot generate text."
        )
    check_attention_heads(config)
    check_positive(config, "sliding_window", "head_dim", "query_pre_attn_scalar")
    if config.final_logit_softcapping is not None:
        check_positive(config, "final_logit_softcapping")
    if config.head_dim % 2:
        raise CheckpointError(f"The config's head_dim {config.head_dim} must be even.")


class Caches(NamedTuple):
    """Keys and values of the tokens so far: one cache for the layers of each kind.

    Attributes:
      of_local: the last tokens, as many as a query sees in addition to itself. None if there is no
        local layer.
      of_global: all tokens. None if there is no global layer.
    """

    of_local: Ring | None
    of_global: Cache | None


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary embedding of one kind of layer (transformers: Gemma3RotaryEmbedding).

    Attributes:
      theta: base of the frequencies.
      factor: positions are divided by it.
      head_dim: channels of a head.
    """

    theta: float
    factor: float
    head_dim: int

    @classmethod
    def from_config(cls, config: PretrainedConfig, layer_type: str) -> "RotaryEmbedding":
        """The embedding that a text config asks for in layers of this type.

        Raises:
          CheckpointError: its type is neither `default` nor `linear`, or its base or factor is not
            above 0.
        """
        parameters = config.rope_parameters[layer_type]
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in ("default", "linear"):
            raise CheckpointError(
                f"The config asks for rope_type {rope_type!r} in {layer_type} layers; 'default' "
                "and 'linear' are supported."
            )

        def parameter(name: str) -> float:
            what = f"The config's {name} of the rotary embedding in {layer_type} layers"
            return positive_number(what, parameters.get(name), error=CheckpointError)

        factor = parameter("factor") if rope_type == "linear" else 1.0
        return cls(parameter("rope_theta"), factor, config.head_dim)

    def __call__(
        self, positions: Int[Array, "tokens"]
    ) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
        """Cosines and sines, float32."""
        frequency = frequencies(self.theta, self.head_dim // 2) / np.float32(self.factor)
        angle = positions[:, None].astype(jnp.float32) * frequency
        return jnp.cos(angle), jnp.sin(angle)


class RMSNorm(nnx.Module):
    """RMS norm that multiplies by 1 + scale (transformers: Gemma3RMSNorm).

    The 1 is added in float32: 1 + scale is often not representable in bfloat16.
    """

    def __init__(self, width: int, epsilon: float, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.zeros(width, dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """The normalised rows, computed in float32 and returned in `x`'s dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with normalised queries and keys (Gemma3Attention)."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.q_heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, bool(config.attention_bias)
        linear = partial(nnx.Linear, use_bias=bias, param_dtype=dtype, rngs=rngs)
        of_heads = partial(linear, hidden, dot_general=dot_general)
        self.q_proj = of_heads(self.q_heads * self.head_dim)
        self.k_proj = of_heads(self.kv_heads * self.head_dim)
        self.v_proj = of_heads(self.kv_heads * self.head_dim)
        self.o_proj = linear(self.q_heads * self.head_dim, hidden, dot_general=by_inputs)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)

    def __call__(
        self,
        hidden: Float[Array, "tokens hidden"],
        cos: Float[Array, "tokens half"],
        sin: Float[Array, "tokens half"],
        attend: KeepingAttend,
        only: Int[Array, "queries"] | None = None,
    ) -> tuple[Float[Array, "queries hidden"], Any]:
        """The attention output and what `attend`, given rotated queries and keys, keeps.

        Keys and values are those of all tokens. Queries, and so the output, are those of the tokens
        with the indices `only`, or of all tokens if it is None.
        """
        tokens = hidden.shape[0]
        queries, q_cos, q_sin = (take_rows(rows, only) for rows in (hidden, cos, sin))
        q = self.q_norm(self.q_proj(queries).reshape(queries.shape[0], -1, self.head_dim))
        k = self.k_norm(self.k_proj(hidden).reshape(tokens, -1, self.head_dim))
        v = self.v_proj(hidden).reshape(tokens, -1, self.head_dim)
        attended, kept = attend(rotate(q, q_cos, q_sin), rotate(k, cos, sin), v)
        return self.o_proj(attended.reshape(attended.shape[0], -1)), kept


class DecoderLayer(nnx.Module):
    """Attention and MLP, each between two norms and with a residual (Gemma3DecoderLayer)."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_activation,
            bias=False,
            dtype=dtype,
            rngs=rngs,
            is_divided=True,
        )
        self.post_feedforward_layernorm = norm()

    def __call__(
        self,
        hidden: Float[Array, "tokens hidden"],
        cos: Float[Array, "tokens half"],
        sin: Float[Array, "tokens half"],
        attend: KeepingAttend,
        only: Int[Array, "queries"] | None = None,
    ) -> tuple[Float[Array, "queries hidden"], Any]:
        """The next hidden state and what `attend` keeps; `only` is as for `Attention`."""
        attended, kept = self.self_attn(self.input_layernorm(hidden), cos, sin, attend, only)
        hidden = take_rows(hidden, only) + self.post_attention_layernorm(attended)

        def feed_forward(rows):
            return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(rows)))

        return hidden + by_rows(feed_forward, hidden), kept


class Gemma3TextModel(LanguageModel):
    """Scaled embeddings, stacked decoder layers and the final norm (transformers: Gemma3TextModel).

    Raises:
      CheckpointError: see `check_config` and `RotaryEmbedding.from_config`; or the config does not
        name a known type for each layer.
    """

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        check_config(config)
        self.kinds = tuple(layer_kinds(config).tolist())
        self.window = config.sliding_window
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dtype = dtype
        self.scale = float(config.query_pre_attn_scalar) ** -0.5
        self.embed_scale = config.hidden_size**0.5
        self.rotary_embs = tuple(
            RotaryEmbedding.from_config(config, layer_type) for layer_type in LAYER_TYPES
        )
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs
        )
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, dtype, rngs), config.num_hidden_layers, rngs
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    @override
    def embed(self, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
        # The scale is rounded to the parameters' dtype, as in transformers.
        embeddings = embedded(self.embed_tokens, token_ids)
        return embeddings * jnp.asarray(self.embed_scale, embeddings.dtype)

    @override
    def empty_cache(self, rows: int, sequences: int = 1) -> Caches:
        of_kind = (ring_rows(self.window, rows), rows)
        layers = [self.kinds.count(kind) for kind in range(len(LAYER_TYPES))]
        of_heads = self.kv_heads, self.head_dim, self.dtype, self.mesh
        of_local, of_global = (
            kind.empty(count, sequences * length, *of_heads) if count else None
            for kind, count, length in zip((Ring, Cache), layers, of_kind, strict=True)
        )
        return Caches(cast(Ring | None, of_local), of_global)

    @override
    def moved(self, cache: Caches, rows: Int[Array, "rows"]) -> Caches:
        return cache._replace(of_global=cache.of_global and cache.of_global.moved(rows))

    @override
    def rings(self, cache: Caches) -> Cache | None:
        return cache.of_local

    @override
    def with_rings(self, cache: Caches, rings: Cache | None) -> Caches:
        return cache._replace(of_local=rings)

    @override
    def copied(
        self, cache: Caches, source: Int[Array, ""], target: Int[Array, ""], sequences: int
    ) -> Caches:
        of_local, of_global = cache
        return Caches(
            of_local and of_local.copied(source, target, sequences),
            of_global and of_global.copied(source, target, sequences),
        )

    @override
    def prefill(
        self,
        embeddings: Float[Array, "rows hidden"],
        position_ids: Int[Array, "1 rows"],
        cached_rows: Sequence[CachedRows],
        head_category: Int[Array, "layers q_heads"],
        cache: Caches,
        *,
        only: OutputRows | None = None,
        backend: str = "auto",
    ) -> tuple[Float[Array, "outputs hidden"], Caches]:
        def step_of(
            kind: int, rows: CachedRows, only: Int[Array, "outputs"] | None = None
        ) -> LayerStep:
            cos, sin = self.rotary_embs[kind](position_ids[0])
            attend = chunk_attend(rows, scale=self.scale, backend=backend)

            def step(
                layer: DecoderLayer, carry: tuple[Array, Caches], of_layer: tuple[Array, Array]
            ) -> tuple[tuple[Array, Caches], None]:
                hidden, caches = carry
                cache: Any = caches[kind]
                hidden, of_kind = layer(
                    hidden, cos, sin, lambda q, k, v: attend(q, k, v, *of_layer, cache), only
                )
                return (hidden, caches._replace(**{Caches._fields[kind]: of_kind})), None

            return step

        steps = [step_of(kind, rows) for kind, rows in enumerate(cached_rows)]
        scanned = (head_category, self._index_in_kind())
        last = len(self.kinds) - 1
        kinds = self.kinds if only is None else self.kinds[:last]
        carry, _ = scan_layers_of_kinds(self.layers, kinds, steps, (embeddings, cache), scanned)
        if only is not None:
            rows = replace(cached_rows[self.kinds[last]], schedule=only.schedule)
            last_step = step_of(self.kinds[last], rows, only.rows)
            carry, _ = run_layer(self.layers, last, last_step, carry, scanned)
        hidden, cache = carry
        return self.norm(hidden), cache

    @override
    def run_layers(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "1 tokens"],
        attends: Sequence[LayerAttend],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        hidden, kept = self._run_kinds(embeddings, position_ids[0], attends, scanned)
        layers = np.argsort(np.argsort(self.kinds, kind="stable"))
        return self.norm(hidden), jax.tree.map(
            lambda *parts: jnp.concatenate(parts)[layers],
            *(kept[kind] for kind in sorted(set(self.kinds))),
        )

    @override
    def decode_step(
        self,
        embedding: Float[Array, "sequences hidden"],
        position: Int[Array, "sequences"],
        cache: Caches,
        cache_index: Int[Array, "sequences"],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "sequences hidden"], Caches]:
        before = jnp.maximum(cache_index, 0)
        # The window includes the token itself, which is not in the ring yet.
        tokens = (jnp.minimum(before, self.window - 1), before)
        attends = [
            of_kind and decode_attend(of_kind, count, scale=self.scale, backend=backend)
            for of_kind, count in zip(cache, tokens, strict=True)
        ]
        hidden, kept = self._run_kinds(embedding, position, attends, self._index_in_kind())
        of_local, of_global = cache
        if of_local is not None:
            k, v = kept[0]
            ring = of_local.k.shape[1] // cache_index.shape[0]
            row = jnp.where(cache_index < 0, -1, cache_index % ring)
            of_local = of_local.written(k, v, row)
        if of_global is not None:
            k, v = kept[1]
            of_global = of_global.written(k, v, cache_index)
        return self.norm(hidden), Caches(of_local, of_global)

    def _index_in_kind(self) -> Int[np.ndarray, "layers"]:
        """The index of each layer among the layers of its kind."""
        kinds = np.asarray(self.kinds)
        return np.asarray(
            [np.count_nonzero(kinds[:layer] == kind) for layer, kind in enumerate(kinds)], np.int32
        )

    def _run_kinds(
        self,
        hidden: Float[Array, "tokens hidden"],
        positions: Int[Array, "tokens"],
        attends: Sequence[LayerAttend | None],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], tuple[Any, ...]]:
        """Runs all layers. Also returns what each kind keeps, stacked; None for an absent kind."""

        # The attention of an absent kind may be None: no layer calls it.
        def step_with(rotary_emb: RotaryEmbedding, attend: Any) -> LayerStep:
            cos, sin = rotary_emb(positions)

            def step(layer: DecoderLayer, hidden: Array, of_layer: Any) -> tuple[Array, Any]:
                return layer(hidden, cos, sin, lambda q, k, v: attend(q, k, v, of_layer))

            return step

        steps = [
            step_with(rotary_emb, attend)
            for rotary_emb, attend in zip(self.rotary_embs, attends, strict=True)
        ]
        return scan_layers_of_kinds(self.layers, self.kinds, steps, hidden, scanned)
