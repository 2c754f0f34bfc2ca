"""The language model of Qwen2-VL and Qwen2.5-VL (transformers: Qwen2VLTextModel)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig
from typing_extensions import override

from bsjax.errors import CheckpointError
from bsjax.models.cache import Cache, CachedRows, OutputRows
from bsjax.models.collectives import embedded
from bsjax.models.config_checks import check_attention_heads
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
    scan_layers,
    stack_layers,
    take_rows,
)


def head_dim(config: PretrainedConfig) -> int:
    """The head dimension of a text config; in these families the config has no field for it."""
    return config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class RotaryEmbedding:
    """M-RoPE (transformers: Qwen2VLRotaryEmbedding): each frequency uses one of three positions.

    Attributes:
      theta: base of the frequencies.
      sections: how many frequencies use the temporal, row and column positions. If there are more
        than three sections, the three axes repeat.
    """

    theta: float
    sections: tuple[int, ...]

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "RotaryEmbedding":
        """The embedding that a text config asks for.

        Raises:
          CheckpointError: its type is not `default`, or its sections do not add up to half the head
            dimension.
        """
        parameters = config.rope_parameters
        if parameters.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"The config asks for rope_type {parameters['rope_type']!r}; only 'default' rotary "
                "embeddings (with an mrope_section) are supported."
            )
        half = head_dim(config) // 2
        sections = tuple(parameters.get("mrope_section", (16, 24, 24)))
        if sum(sections) != half:
            raise CheckpointError(
                f"The config's mrope_section {list(sections)} must add up to half the head "
                f"dimension, {half}."
            )
        return cls(float(parameters["rope_theta"]), sections)

    def __call__(
        self, position_ids: Int[Array, "3 tokens"]
    ) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
        """Cosines and sines, float32."""
        axis = np.repeat(np.arange(len(self.sections)) % 3, self.sections)
        angle = position_ids[axis].T.astype(jnp.float32) * frequencies(self.theta, axis.size)
        return jnp.cos(angle), jnp.sin(angle)


class Attention(nnx.Module):
    """Grouped-query self-attention (transformers: Qwen2VLAttention)."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.q_heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        hidden = config.hidden_size
        self.head_dim = head_dim(config)
        linear = partial(nnx.Linear, param_dtype=dtype, rngs=rngs)
        of_heads = partial(linear, hidden, dot_general=dot_general)
        self.q_proj = of_heads(self.q_heads * self.head_dim)
        self.k_proj = of_heads(self.kv_heads * self.head_dim)
        self.v_proj = of_heads(self.kv_heads * self.head_dim)
        self.o_proj = linear(
            self.q_heads * self.head_dim, hidden, use_bias=False, dot_general=by_inputs
        )

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
        q = rotate(self.q_proj(queries).reshape(queries.shape[0], -1, self.head_dim), q_cos, q_sin)
        k = rotate(self.k_proj(hidden).reshape(tokens, -1, self.head_dim), cos, sin)
        v = self.v_proj(hidden).reshape(tokens, -1, self.head_dim)
        attended, kept = attend(q, k, v)
        return self.o_proj(attended.reshape(attended.shape[0], -1)), kept


class DecoderLayer(nnx.Module):
    """Attention and MLP, each after a norm and with a residual (Qwen2VLDecoderLayer)."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        norm = partial(nnx.RMSNorm, hidden, epsilon=epsilon, param_dtype=dtype, rngs=rngs)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = norm()
        self.mlp = GatedMLP(
            hidden,
            config.intermediate_size,
            config.hidden_act,
            bias=False,
            dtype=dtype,
            rngs=rngs,
            is_divided=True,
        )

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
        hidden = take_rows(hidden, only) + attended
        hidden = hidden + by_rows(
            lambda rows: self.mlp(self.post_attention_layernorm(rows)), hidden
        )
        return hidden, kept


class Qwen2VLTextModel(LanguageModel):
    """Embeddings, stacked decoder layers and the final norm (transformers: Qwen2VLTextModel).

    Raises:
      CheckpointError: the config asks for sliding windows or for rotary embeddings other than
        M-RoPE's default, or its numbers of heads do not fit each other or the hidden size.
    """

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        if "sliding_attention" in (config.layer_types or ()):
            raise CheckpointError(
                "The config asks for sliding-window layers (use_sliding_window), which bsjax does "
                "not support in this family; no published Qwen2-VL or Qwen2.5-VL model has them."
            )
        check_attention_heads(config)
        if config.hidden_size % config.num_attention_heads:
            raise CheckpointError(
                f"The config's hidden_size {config.hidden_size} is not a multiple of its "
                f"{config.num_attention_heads} attention heads."
            )
        self.num_layers = config.num_hidden_layers
        self.kv_heads = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.dtype = dtype
        self.scale = self.head_dim**-0.5
        self.rotary_emb = RotaryEmbedding.from_config(config)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs
        )
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, dtype, rngs), config.num_hidden_layers, rngs
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=dtype, rngs=rngs
        )

    @override
    def embed(self, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
        return embedded(self.embed_tokens, token_ids)

    @override
    def empty_cache(self, rows: int, sequences: int = 1) -> tuple[Cache]:
        shape = (self.num_layers, sequences * rows, self.kv_heads, self.head_dim)
        return (Cache.empty(*shape, self.dtype, self.mesh),)

    @override
    def moved(self, cache: tuple[Cache], rows: Int[Array, "rows"]) -> tuple[Cache]:
        return (cache[0].moved(rows),)

    @override
    def copied(
        self, cache: tuple[Cache], source: Int[Array, ""], target: Int[Array, ""], sequences: int
    ) -> tuple[Cache]:
        return (cache[0].copied(source, target, sequences),)

    @override
    def prefill(
        self,
        embeddings: Float[Array, "rows hidden"],
        position_ids: Int[Array, "3 rows"],
        cached_rows: Sequence[CachedRows],
        head_category: Int[Array, "layers q_heads"],
        cache: tuple[Cache],
        *,
        only: OutputRows | None = None,
        backend: str = "auto",
    ) -> tuple[Float[Array, "outputs hidden"], tuple[Cache]]:
        cos, sin = self.rotary_emb(position_ids)

        def step_of(rows: CachedRows, only: Int[Array, "outputs"] | None = None) -> LayerStep:
            attend = chunk_attend(rows, scale=self.scale, backend=backend)

            def step(
                layer: DecoderLayer, carry: tuple[Array, Cache], of_layer: tuple[Array, Array]
            ) -> tuple[tuple[Array, Cache], None]:
                hidden, cache = carry
                return layer(
                    hidden, cos, sin, lambda q, k, v: attend(q, k, v, *of_layer, cache), only
                ), None

            return step

        (rows,) = cached_rows
        carry = (embeddings, cache[0])
        scanned = (head_category, jnp.arange(self.num_layers, dtype=jnp.int32))
        if only is None:
            carry, _ = scan_layers(self.layers, step_of(rows), carry, scanned)
        else:
            last = self.num_layers - 1
            last_step = step_of(replace(rows, schedule=only.schedule), only.rows)
            carry, _ = scan_layers(self.layers, step_of(rows), carry, scanned, layers=last)
            carry, _ = run_layer(self.layers, last, last_step, carry, scanned)
        hidden, of_all = carry
        return self.norm(hidden), (of_all,)

    @override
    def run_layers(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "3 tokens"],
        attends: Sequence[LayerAttend],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        (attend,) = attends
        cos, sin = self.rotary_emb(position_ids)

        def step(layer: DecoderLayer, hidden: Array, of_layer: Any) -> tuple[Array, Any]:
            return layer(hidden, cos, sin, lambda q, k, v: attend(q, k, v, of_layer))

        hidden, kept = scan_layers(self.layers, step, embeddings, scanned)
        return self.norm(hidden), kept

    @override
    def decode_step(
        self,
        embedding: Float[Array, "sequences hidden"],
        position: Int[Array, "sequences"],
        cache: tuple[Cache],
        cache_index: Int[Array, "sequences"],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "sequences hidden"], tuple[Cache]]:
        (of_all,) = cache
        tokens = jnp.maximum(cache_index, 0)
        attend = decode_attend(of_all, tokens, scale=self.scale, backend=backend)
        layers = jnp.arange(self.num_layers)
        position_ids = jnp.broadcast_to(position, (3, position.shape[0]))
        hidden, (k, v) = self.run_layers(embedding, position_ids, (attend,), layers)
        return hidden, (of_all.written(k, v, cache_index),)
