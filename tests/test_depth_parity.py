"""A deep model is the same program as a shallow one, and no program holds tokens x tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from bsjax.categories import HeadCategory
from bsjax.models import FAMILIES, Cache
from bsjax.schedule import build_schedule
from bsjax.template import Template
from tests.small_models import IMAGE, Shape, random_prompt, small_config

ROWS = 512
PATCHES = 1024


def equations(jaxpr):
    """Every equation, those of nested programs included."""
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
    template = Template.from_tokens(prompt.token_ids, IMAGE)
    tables = [category.groups for category in HeadCategory]
    schedule = build_schedule(template, tables, block_q=64, block_kv=64, tokens=ROWS)
    text = config.text_config
    heads = text.num_attention_heads
    cache = np.zeros((depth, ROWS, text.num_key_value_heads, text.hidden_size // heads), np.float32)

    def trace(method, *arguments, **options):
        def call(state, *arguments):
            return getattr(nnx.merge(graph, state), method)(*arguments, **options)

        return list(equations(jax.make_jaxpr(call)(state, *arguments).jaxpr))

    return {
        "encode_images": trace(
            "encode_images", np.zeros((PATCHES, prompt.pixel_values.shape[1]), np.float32), plan
        ),
        "prefill": trace(
            "prefill",
            np.zeros((ROWS, text.hidden_size), np.float32),
            np.zeros((3, ROWS), np.int32),
            schedule,
            np.zeros((depth, heads), np.int32),
            cache_length=ROWS,
            backend="xla",
        ),
        "decode_step": trace(
            "decode_step", np.int32(0), np.zeros(3, np.int32), Cache(cache, cache), np.int32(4)
        ),
    }


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_programs_do_not_grow_with_depth(family):
    shallow, deep = programs(family, 2), programs(family, 8)
    for name in shallow:
        assert [equation.primitive for equation in shallow[name]] == [
            equation.primitive for equation in deep[name]
        ]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_no_array_of_rows_by_rows(family):
    traced = programs(family, 2)
    for name, rows in (("encode_images", PATCHES), ("prefill", ROWS)):
        largest = max(
            variable.aval.size for equation in traced[name] for variable in equation.outvars
        )
        assert largest < rows * rows, name
