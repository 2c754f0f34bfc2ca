"""32K tokens through Qwen2-VL-2B, compiled for an H200: no array has tokens x tokens elements.

The compiled program's own text says how large its arrays are, and its memory analysis what it peaks
at: none has tokens x tokens elements, and the peak is far below what one such array would take.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import Qwen2VLConfig

from bsjax import HeadCategory, Image, Template, Text, steps
from bsjax.attention import block_sizes
from bsjax.inputs import cache_rows
from bsjax.models import FAMILIES
from bsjax.sampling import Sampling
from bsjax.schedule import build_schedule, category_tables
from tests.gpu_compiler import require_gpu_compiler
from tools.gpu_targets import compile_for

LAYERS, Q_HEADS = 28, 12


@pytest.fixture(scope="module")
def model():
    require_gpu_compiler()
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": Q_HEADS,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "tie_word_embeddings": True,
        },
        vision_config={"hidden_size": 1536, "embed_dim": 1280, "depth": 32, "num_heads": 16},
        tie_word_embeddings=True,
    )
    family = FAMILIES["qwen2_vl"]
    graph, parameters = nnx.split(nnx.eval_shape(lambda: family.build(config, jnp.bfloat16)))
    return config, family, graph, parameters


def largest_array(compiled) -> int:
    """Elements of the largest array that the optimized program mentions."""
    shapes = re.findall(r"\b(?:pred|[sufb]f?\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def program(graph, function, *static):
    return lambda parameters, *arguments: function(
        nnx.merge(graph, parameters), *arguments, *static
    )


def test_prefill_of_32k_tokens(model):
    config, _, graph, parameters = model
    template = Template.from_segments([Text(8)] + [Image(1012), Text(11)] * 32)
    tokens = 32768
    assert 0.98 * tokens < template.tokens <= tokens
    block_q, block_kv = block_sizes("pallas", 128, jnp.bfloat16, sparse=True)
    head_category = np.arange(LAYERS * Q_HEADS, dtype=np.int32).reshape(LAYERS, Q_HEADS) % 4
    schedule = build_schedule(
        template,
        category_tables(list(HeadCategory)),
        block_q=block_q,
        block_kv=block_kv,
        tokens=tokens,
    )
    compiled = compile_for(
        program(graph, steps.prefill, cache_rows(tokens + 64), "pallas"),
        (
            parameters,
            jax.ShapeDtypeStruct((tokens, config.text_config.hidden_size), jnp.bfloat16),
            jax.ShapeDtypeStruct((3, tokens), jnp.int32),
            schedule,
            head_category,
            np.int32(0),
            Sampling.checked(0.0, None, None, 0),
        ),
    )
    assert "prefill_attention" in compiled.as_text(), "the GPU kernel is in the program"
    assert largest_array(compiled) < tokens**2 / 2
    memory = compiled.memory_analysis()
    one_head_of_scores = 2 * tokens**2
    assert memory.temp_size_in_bytes < one_head_of_scores
    cache = 2 * 2 * LAYERS * cache_rows(tokens + 64) * 2 * 128
    assert memory.output_size_in_bytes < 1.01 * cache + 2**20


def test_vision_tower_of_64k_patches(model):
    config, family, graph, parameters = model
    patches = 65536
    grids = np.tile([[1, 44, 46]], (32, 1))
    block_q, block_kv = block_sizes("pallas", 80, jnp.bfloat16, sparse=True)
    plan = family.vision_plan(grids, config, patches=patches, block_q=block_q, block_kv=block_kv)
    compiled = compile_for(
        program(graph, steps.encode_images, "pallas"),
        (parameters, jax.ShapeDtypeStruct((patches, 1176), jnp.float32), plan),
    )
    assert largest_array(compiled) < patches**2 / 8
    assert compiled.memory_analysis().temp_size_in_bytes < patches**2
