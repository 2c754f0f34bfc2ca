"""A deep model compiles to the same program as a shallow one, without tokens x tokens arrays."""

from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import build_schedule
from bsjax.masks.template import Template
from bsjax.models import FAMILIES
from tests.support.small_models import IMAGE, Shape, random_prompt, small_config

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
    template = Template.from_tokens(prompt.token_ids, IMAGE)
    tables = [category.groups for category in HeadCategory]
    schedules = tuple(
        build_schedule(
            template, tables, block_q=64, block_kv=64, visibility=visibility, tokens=ROWS
        )
        for visibility in FAMILIES[family].visibilities(config)
    )
    text = config.text_config
    heads = text.num_attention_heads

    def call(method, **options):
        return lambda state, *arguments: attrgetter(method)(nnx.merge(graph, state))(
            *arguments, **options
        )

    def trace(function, *arguments):
        return list(equations(jax.make_jaxpr(function)(state, *arguments).jaxpr))

    prefill = call("language_model.prefill", cache_length=ROWS, backend="xla")
    of_prefill = (
        np.zeros((ROWS, text.hidden_size), np.float32),
        np.zeros((3 if family.startswith("qwen") else 1, ROWS), np.int32),
        schedules,
        np.zeros((depth, heads), np.int32),
    )
    _, cache = jax.eval_shape(prefill, state, *of_prefill)
    return {
        "encode_images": trace(
            call("encode_images"),
            np.zeros((PATCHES, prompt.pixel_values.shape[1]), np.float32),
            plan,
        ),
        "prefill": trace(prefill, *of_prefill),
        "decode_step": trace(call("decode_step"), np.int32(0), np.int32(0), cache, np.int32(4)),
    }


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
    for name, rows in (("encode_images", PATCHES), ("prefill", ROWS)):
        largest = max(
            variable.aval.size for equation in traced[name] for variable in equation.outvars
        )
        assert largest < rows * rows, name
