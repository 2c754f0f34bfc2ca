"""A deep model compiles to the same program as a shallow one, without tokens x tokens arrays."""

from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from bsjax.models import FAMILIES
from bsjax.runtime.sizes import cache_rows
from tests.support.chunks import chunks_of
from tests.support.small_models import Shape, random_prompt, small_config

ROWS = 512
PATCHES = 1024


def equations(jaxpr):
    """All equations, including those of nested programs."""
    for equation in jaxpr.eqns:
        yield equation
        for nested in jax.tree.leaves(
            equation.params,
            is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr),
        ):
            if isinstance(nested, ClosedJaxpr):
                yield from equations(nested.jaxpr)
            elif isinstance(nested, Jaxpr):
                yield from equations(nested)


def programs(family: str, depth: int) -> dict[str, list]:
    """The equations of encoding images, prefill and a decode step, traced without parameters."""
    config = small_config(
        Shape(family, layers=depth, vision_depth=depth, full_attention_blocks=(0,))
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: FAMILIES[family].build(config, jnp.float32)))
    prompt = random_prompt(config, [(5, 7), (9, 9)])
    plan = FAMILIES[family].vision_plan(
        prompt.grid_thw, config, patches=PATCHES, block_q=64, block_kv=64
    )
    text = config.text_config
    heads = text.num_attention_heads

    def call(method, **options):
        return lambda state, *arguments, **more: attrgetter(method)(nnx.merge(graph, state))(
            *arguments, **options, **more
        )

    def trace(function, *arguments, **more):
        return list(equations(jax.make_jaxpr(function)(state, *arguments, **more).jaxpr))

    categories = np.arange(depth * heads, dtype=np.int32).reshape(depth, heads) % 4
    chunks = chunks_of(
        FAMILIES[family], config, prompt, categories, rows=(ROWS,), all_outputs=False
    )
    (chunk,) = chunks
    language_model = nnx.merge(graph, state).language_model
    cache = jax.eval_shape(lambda: language_model.empty_cache(*chunks.layout))
    return {
        "encode_images": trace(
            call("encode_images"),
            np.zeros((PATCHES, prompt.pixel_values.shape[1]), np.float32),
            plan,
        ),
        "prefill": trace(
            call("language_model.prefill", backend="xla"),
            np.zeros((ROWS, text.hidden_size), np.float32),
            chunk.arguments.position_ids,
            chunk.arguments.cached_rows,
            categories,
            cache,
            only=chunk.arguments.outputs,
        ),
        "decode_step": trace(
            call("decode_step"),
            np.int32([0]),
            np.int32([0]),
            cache,
            np.int32([4]),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3"])
def test_programs_do_not_grow_with_depth(family):
    """Gemma 3's kinds of layers repeat every three layers here; both depths have two left over."""
    shallow, deep = programs(family, 5), programs(family, 11)
    for name in shallow:
        assert [equation.primitive for equation in shallow[name]] == [
            equation.primitive for equation in deep[name]
        ]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3"])
def test_no_array_has_rows_times_rows_elements(family):
    traced = programs(family, 3)
    for name, rows, keys in (
        ("encode_images", PATCHES, PATCHES),
        ("prefill", ROWS, cache_rows(ROWS)),
    ):
        largest = max(
            variable.aval.size for equation in traced[name] for variable in equation.outvars
        )
        assert largest < rows * keys, name
