"""Every family computes what transformers computes: vision towers, logits, greedy tokens, bfloat16.

The reference is torch on the CPU; models are random. Families differ only in the table of cases.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import bucket
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import visible
from bsjax.models import FAMILIES
from bsjax.models.cache import PADDING_ROW
from bsjax.models.gemma3.vision_plan import patch_order
from tests.support.chunks import EVERY_TOKEN, chunks_of
from tests.support.parity import torch
from tests.support.small_models import (
    IMAGE,
    VOCABULARY,
    RandomPrompt,
    Shape,
    cast,
    ported,
    random_prompt,
    random_reference,
    reference_features,
    reference_inputs,
    small_config,
)

pytestmark = pytest.mark.parity

FAMILY_NAMES = ("qwen2_vl", "qwen2_5_vl", "gemma3")
TOLERANCE = 1e-4
NEW_TOKENS = 32
BLOCKS = {"block_q": 32, "block_kv": 16}

Images = tuple[tuple[int, int], ...]
ASPECTS: Images = ((4, 4), (2, 16), (5, 3), (16, 2), (1, 8), (2, 2), (3, 1))
"""Rows and columns in image tokens, from 1:1 to 1:8 and 8:1; sides that windows do not divide."""

CASES: dict[str, tuple[Shape, Images]] = {
    "no image": (Shape("", q_heads=4, kv_heads=4, tied=True, pattern=2), ()),
    "one image": (Shape("", q_heads=4, kv_heads=2, pattern=2), ((6, 9),)),
    "two images, one layer": (Shape("", q_heads=4, kv_heads=1, layers=1), ((3, 5), (9, 4))),
    "seven images, four layers": (
        Shape("", q_heads=8, kv_heads=1, layers=4, tied=True, vision_depth=4,
              full_attention_blocks=(0, 2)),
        ASPECTS,
    ),
    "head dims 32 and 40": (
        Shape("", q_heads=2, kv_heads=2, head_dim=32, vision_head_dim=40, vision_depth=1,
              full_attention_blocks=(), pattern=2),
        ((7, 7), (1, 1)),
    ),
}  # fmt: skip

REAL_WIDTHS = {
    "qwen2_vl": Shape(
        "qwen2_vl", layers=1, q_heads=12, kv_heads=2, head_dim=128, inner=8960,
        tied=True, vision_heads=16, vision_head_dim=80, vision_inner=5120, patch_size=14,
    ),
    "qwen2_5_vl": Shape(
        "qwen2_5_vl", layers=1, q_heads=16, kv_heads=2, head_dim=128, inner=11008,
        tied=True, vision_heads=16, vision_head_dim=80, vision_inner=3420, patch_size=14,
    ),
    "gemma3": Shape(
        "gemma3", layers=2, pattern=2, q_heads=8, kv_heads=4, head_dim=256, hidden=2560,
        inner=10240, tied=True, vision_depth=1, vision_heads=16,
        vision_head_dim=72, vision_inner=4304, patch_size=14, window=24, image_side=16, pooled=4,
    ),
}  # fmt: skip

for_families = pytest.mark.parametrize("family", FAMILY_NAMES)
SLOW_CASES = ("no image", "two images, one layer")
for_cases = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in SLOW_CASES else ()) for case in CASES],
)


class Port:
    """Our model on one prompt: padded to buckets, jitted, results back in prompt order."""

    def __init__(self, reference: torch.nn.Module, dtype=jnp.float32) -> None:
        self.config = reference.config
        self.family = FAMILIES[self.config.model_type]
        self.module = ported(reference, dtype)
        self.split = graph, self.state = nnx.split(self.module)

        @cache
        def jitted(method: str, **options):
            def call(state, *arguments, **more):
                return attrgetter(method)(nnx.merge(graph, state))(*arguments, **options, **more)

            return partial(jax.jit(call), self.state)

        self.jitted = jitted
        self.encode = jitted("encode_images")
        self.embed = jitted("language_model.embed")
        self.logits_of = jitted("logits")
        self.decode = jitted("decode_step")

    def image_features(self, prompt: RandomPrompt):
        """Features of all rows, padding included; padding rows of the input hold large noise."""
        if not len(prompt.grid_thw):
            return None
        rows = bucket(len(prompt.pixel_values) + 1, smallest=64)
        plan = self.family.vision_plan(prompt.grid_thw, self.config, patches=rows, **BLOCKS)
        pixels = np.random.default_rng(1).normal(
            scale=50, size=(rows, prompt.pixel_values.shape[1])
        )
        pixels[: len(prompt.pixel_values)] = prompt.pixel_values
        return self.encode(pixels.astype(np.float32), plan)

    def prefill(
        self,
        prompt: RandomPrompt,
        *,
        categories=None,
        packed=False,
        sinks=None,
        chunk_rows=None,
        all_outputs=True,
    ):
        """Logits in prompt order, the cache, and the position id that follows.

        Logits are [tokens, vocabulary], or [1, vocabulary] of the last token without `all_outputs`.

        With `packed` but without `categories`, all heads are SINK heads and all image tokens are
        sinks, so that packed order is used and the result is dense. By default the prompt is one
        chunk.
        """
        text = self.config.get_text_config()
        tokens = len(prompt.token_ids)
        if categories is None:
            dense = HeadCategory.SINK if packed else HeadCategory.DENSE
            sinks = EVERY_TOKEN if packed else sinks
            shape = (text.num_hidden_layers, text.num_attention_heads)
            categories = np.full(shape, dense, np.int32)
        chunks = chunks_of(
            self.family,
            self.config,
            prompt,
            categories,
            sinks=sinks,
            blocks=tuple(BLOCKS.values()),
            rows=[bucket(tokens + 1, smallest=64)] if chunk_rows is None else chunk_rows,
            new_tokens=NEW_TOKENS,
            all_outputs=all_outputs,
        )
        features = self.image_features(prompt)
        run = self.jitted("language_model.prefill", backend="xla")
        cache = self.module.language_model.empty_cache(*chunks.layout)
        logits = np.empty((tokens, text.vocab_size), np.float32)
        for chunk in chunks:
            embeddings = self.embed(chunk.arguments.token_ids)
            if features is not None:
                row = chunk.arguments.feature_row
                is_image = (row != PADDING_ROW)[:, None]
                embeddings = np.where(is_image, features[row % len(features)], embeddings)
            arguments = chunk.arguments
            hidden, cache = run(
                embeddings,
                arguments.position_ids,
                arguments.cached_rows,
                categories,
                cache,
                only=arguments.outputs,
            )
            if all_outputs:
                logits[chunk.position[: chunk.tokens]] = self.logits_of(hidden)[: chunk.tokens]
            elif chunk.last_parts:
                logits = np.asarray(self.logits_of(hidden))
        keys = chunk.arguments.cached_rows[-1].schedule.keys.position[:tokens]
        assert packed == bool(np.any(np.diff(keys) < 0))
        return logits, cache, chunks.prompts[0].inputs.next_position

    def greedy(
        self,
        prompt: RandomPrompt,
        *,
        packed: bool = False,
        new_tokens: int = NEW_TOKENS,
        prefilled=None,
    ) -> tuple[list[int], np.ndarray]:
        """The tokens, and the logits [new tokens, vocabulary] that they were chosen from.

        `prefilled` is what `prefill` returned, if it has run already.
        """
        logits, cache, next_position = prefilled or self.prefill(prompt, packed=packed)
        of_steps = [logits[-1]]
        for step in range(new_tokens - 1):
            logits, cache = self.decode(
                of_steps[-1].argmax(keepdims=True).astype(np.int32),
                np.asarray([next_position + step], np.int32),
                cache,
                np.asarray([len(prompt.token_ids) + step], np.int32),
            )
            of_steps.append(np.asarray(logits[0]))
        stacked = np.stack(of_steps)
        return stacked.argmax(axis=1).tolist(), stacked


def reference_logits(reference: torch.nn.Module, prompt: RandomPrompt, **options) -> np.ndarray:
    with torch.no_grad():
        outputs = reference(**(reference_inputs(reference, prompt) | options))
    return outputs.logits[0].float().numpy()


@contextlib.contextmanager
def attending_as(reference: torch.nn.Module, template: Template, categories: np.ndarray):
    """Makes every layer of `reference` use the predicate's masks, by kind and head category."""
    config = reference.config
    family, info = FAMILIES[config.model_type], template.info
    query = type(info)(*(field[:, None] for field in info))
    masks = {
        (kind, category): visible(query, info, category.groups, visibility)
        for kind, visibility in enumerate(family.visibilities(config))
        for category in HeadCategory
    }

    def use_mask(mask, module, arguments, options):
        return arguments, options | {"attention_mask": mask}

    handles = []
    for layer, kind, of_heads in zip(
        reference.model.language_model.layers, family.layer_kinds(config), categories, strict=True
    ):
        mask = np.stack([masks[int(kind), HeadCategory(category)] for category in of_heads])[None]
        hook = partial(use_mask, torch.tensor(mask))
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assert_greedy_matches(
    ours: tuple[list[int], np.ndarray],
    reference: torch.nn.Module,
    prompt: RandomPrompt,
    new_tokens: int = NEW_TOKENS,
) -> None:
    generated = reference.generate(
        **reference_inputs(reference, prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens, logits = ours
    assert len(tokens) == new_tokens
    assert tokens == generated.sequences[0, len(prompt.token_ids) :].tolist()
    assert_close(logits, torch.cat(generated.logits).numpy())


def assert_close(ours, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    error = np.abs(np.asarray(ours, np.float32) - expected).max()
    assert error <= tolerance * np.abs(expected).max()


@dataclass(frozen=True)
class Pair:
    reference: torch.nn.Module
    port: Port


@cache
def pair(shape: Shape) -> Pair:
    reference = random_reference(small_config(shape))
    return Pair(reference, Port(reference))


def case_of(family: str, case: str) -> tuple[Pair, RandomPrompt]:
    shape, images = CASES[case]
    models = pair(shape.with_family(family))
    return models, random_prompt(models.reference.config, list(images))


@pytest.mark.slow
@for_families
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1]])
def test_image_features_equal_transformers(family, case):
    models, prompt = case_of(family, case)
    expected = reference_features(models.reference, prompt)
    ours = models.port.image_features(prompt)[: len(expected)]
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


@for_families
@for_cases
def test_logits_at_every_position_equal_transformers(family, case):
    models, prompt = case_of(family, case)
    logits, _, _ = models.port.prefill(prompt)
    assert_close(logits, reference_logits(models.reference, prompt))


@pytest.mark.slow
@for_families
@for_cases
def test_greedy_tokens_and_their_logits_equal_transformers(family, case):
    models, prompt = case_of(family, case)
    assert_greedy_matches(models.port.greedy(prompt), models.reference, prompt)


@pytest.mark.slow
@for_families
def test_adjacent_images_are_separate_images(family):
    """If no text is between images, transformers cannot compute positions for Qwen, and takes the
    images of a Gemma prompt for a single one. Here it is given bsjax's positions and masks.
    """
    models, _ = case_of(family, "one image")
    config = models.reference.config
    prompt = random_prompt(config, [(3, 4), (3, 4), (5, 2)], adjacent=True)
    logits, _, _ = models.port.prefill(prompt)
    position_ids, _ = FAMILIES[family].positions(prompt.token_ids, prompt.grid_thw, config)
    options = (
        {} if len(position_ids) == 1 else {"position_ids": torch.tensor(position_ids)[:, None]}
    )
    template = Template.from_tokens(prompt.token_ids, IMAGE, image_tokens=prompt.image_tokens)
    text = config.text_config
    dense = np.zeros((text.num_hidden_layers, text.num_attention_heads), np.int32)
    with attending_as(models.reference, template, dense):
        expected = reference_logits(models.reference, prompt, **options)
    assert_close(logits, expected)


@pytest.mark.slow
@for_families
def test_packed_order_changes_no_result(family):
    models, prompt = case_of(family, "seven images, four layers")
    logits, _, _ = models.port.prefill(prompt, packed=True)
    assert_close(logits, reference_logits(models.reference, prompt))
    assert_greedy_matches(models.port.greedy(prompt, packed=True), models.reference, prompt)


@pytest.mark.slow
@for_families
@pytest.mark.parametrize("packed", [False, True], ids=["prompt order", "packed order"])
def test_chunks_change_no_result(family, packed):
    """Chunks of two sizes, which cut through images where the family allows it."""
    models, prompt = case_of(family, "seven images, four layers")
    logits, cache, _ = models.port.prefill(prompt, packed=packed, chunk_rows=(16, 32))
    whole_logits, whole, _ = models.port.prefill(prompt, packed=packed)
    expected = reference_logits(models.reference, prompt)
    assert_close(logits, expected)
    assert_close(whole_logits, expected)
    last, of_last, _ = models.port.prefill(
        prompt, packed=packed, chunk_rows=(16, 32), all_outputs=False
    )
    assert_close(last, expected[-1:])
    for other in (whole, of_last):
        for ours, wanted in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@for_families
def test_chunks_of_a_prompt_that_ends_in_an_image(family):
    """One layer, so that the last one is the first; images are larger than chunks."""
    models, whole = case_of(family, "two images, one layer")
    end = int(np.flatnonzero(whole.token_ids == IMAGE)[-1]) + 1
    prompt = replace(whole, token_ids=whole.token_ids[:end])
    expected = reference_logits(models.reference, prompt)
    for packed in (False, True):
        logits, _, _ = models.port.prefill(prompt, packed=packed, chunk_rows=(16,))
        assert_close(logits, expected)
        last, _, _ = models.port.prefill(prompt, packed=packed, chunk_rows=(16,), all_outputs=False)
        assert_close(last, expected[-1:])


@pytest.mark.slow
@for_families
def test_every_layer_and_head_uses_its_category(family):
    """Block-sparse prefill in packed order is dense attention under the masks of the predicate."""
    models, prompt = case_of(family, "seven images, four layers")
    text = models.reference.config.text_config
    sinks = Sinks(first=2, offsets=(5,))
    categories = np.random.default_rng(2).integers(
        0, len(HeadCategory), (text.num_hidden_layers, text.num_attention_heads), dtype=np.int32
    )
    template = Template.from_tokens(prompt.token_ids, IMAGE, sinks, prompt.image_tokens)
    with attending_as(models.reference, template, categories):
        expected = reference_logits(models.reference, prompt)

    for chunk_rows in (None, (16,)):
        logits, _, _ = models.port.prefill(
            prompt, categories=categories, packed=True, sinks=sinks, chunk_rows=chunk_rows
        )
        assert_close(logits, expected)
    dense = reference_logits(models.reference, prompt)
    assert np.abs(dense - expected).max() > 100 * TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
def test_the_tower_equals_transformers_before_its_projector():
    models, prompt = case_of("gemma3", "seven images, four layers")
    config = models.reference.config
    pixels = reference_inputs(models.reference, prompt)["pixel_values"]
    with torch.no_grad():
        expected = models.reference.model.vision_tower(pixels).last_hidden_state.numpy()
    rows = len(prompt.pixel_values)
    plan = FAMILIES["gemma3"].vision_plan(prompt.grid_thw, config, patches=rows, **BLOCKS)
    tower = nnx.merge(*models.port.split).vision_tower
    ours = np.asarray(tower(*jax.tree.map(jnp.asarray, (prompt.pixel_values, plan)), backend="xla"))
    expected = expected[:, patch_order(config)].reshape(ours.shape)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.slow
def test_what_layers_keep_is_returned_in_layer_order():
    """With alternating kinds of layers, what they keep is returned in the order of the layers."""
    models, prompt = case_of("gemma3", "seven images, four layers")
    config = models.reference.config
    assert FAMILIES["gemma3"].layer_kinds(config).tolist() == [0, 0, 1, 0]

    def attend_with(kind):
        def attend(q, k, v, number):
            return q, (number, kind + 0 * number, k)

        return attend

    module = nnx.merge(*models.port.split)
    embeddings = module.language_model.embed(jnp.asarray(prompt.token_ids))
    positions = jnp.arange(len(prompt.token_ids))[None]
    _, (number, kind, k) = module.language_model.run_layers(
        embeddings, positions, [attend_with(0), attend_with(1)], jnp.arange(4) * 10
    )
    assert number.tolist() == [0, 10, 20, 30] and kind.tolist() == [0, 0, 1, 0]
    assert k.shape == (4, len(prompt.token_ids), 1, 16)


@pytest.mark.slow
@pytest.mark.parametrize("window", [24, 4096])
def test_windows_may_be_longer_than_an_image_or_the_prompt(window):
    """A window whose edge cuts through images, and one that is longer than the cache."""
    shape, images = CASES["seven images, four layers"]
    models = pair(replace(shape.with_family("gemma3"), window=window))
    prompt = random_prompt(models.reference.config, list(images))
    assert 2 * 24 < len(prompt.token_ids) < 4096 - NEW_TOKENS
    logits, cache, _ = models.port.prefill(prompt)
    assert cache.of_local.k.shape[1] == min(window - 1, cache.of_global.k.shape[1])
    assert_close(logits, reference_logits(models.reference, prompt))
    assert_greedy_matches(models.port.greedy(prompt), models.reference, prompt)


@pytest.mark.slow
def test_a_model_with_only_global_layers_equals_transformers():
    shape, images = CASES["one image"]
    models = pair(replace(shape.with_family("gemma3"), pattern=1))
    prompt = random_prompt(models.reference.config, list(images))
    logits, cache, _ = models.port.prefill(prompt)
    assert cache.of_local is None
    assert_close(logits, reference_logits(models.reference, prompt))
    assert_greedy_matches(models.port.greedy(prompt), models.reference, prompt)


@pytest.mark.slow
def test_the_soft_cap_applies_to_models_that_read_images():
    """transformers' Gemma3ForConditionalGeneration ignores it; Gemma3ForCausalLM does not."""
    shape, images = CASES["one image"]
    models = pair(replace(shape.with_family("gemma3"), softcap=3.0))
    prompt = random_prompt(models.reference.config, list(images))
    logits, _, _ = models.port.prefill(prompt)
    uncapped = reference_logits(models.reference, prompt)
    assert np.abs(uncapped).max() > 3
    assert_close(logits, 3 * np.tanh(uncapped / 3))
    assert_close(FAMILIES["gemma3"].reference_logits(uncapped, models.reference.config), logits)


@pytest.mark.slow
def test_a_text_only_model_with_a_soft_cap_equals_transformers():
    """A prompt of several windows, no vision tower, and the class of transformers that does cap."""
    reference = random_reference(small_config(Shape("gemma3_text", layers=4, softcap=3.0)))
    port = Port(reference)
    token_ids = np.random.default_rng(0).integers(1, VOCABULARY, 40).astype(np.int32)
    token_ids[token_ids == IMAGE] = 1
    prompt = RandomPrompt(token_ids, np.zeros((0, 3), np.int64), None, ())
    logits, _, _ = port.prefill(prompt)
    expected = reference_logits(reference, prompt)
    assert 2.5 < np.abs(expected).max() < 3
    assert_close(logits, expected)
    assert_greedy_matches(port.greedy(prompt), reference, prompt)


@pytest.mark.slow
@for_families
def test_models_of_published_widths_equal_transformers(family):
    reference = random_reference(small_config(REAL_WIDTHS[family]))
    prompt = random_prompt(reference.config, [(6, 9), (1, 8)])
    # Models this wide run for long: they have as few layers as there are kinds of layers, and
    # decode few tokens.
    port = Port(reference)
    prefilled = port.prefill(prompt)
    assert_close(prefilled[0], reference_logits(reference, prompt))
    features = reference_features(reference, prompt)
    np.testing.assert_allclose(
        port.image_features(prompt)[: len(features)], features, atol=TOLERANCE, rtol=TOLERANCE
    )
    tokens = port.greedy(prompt, new_tokens=4, prefilled=prefilled)
    assert_greedy_matches(tokens, reference, prompt, new_tokens=4)


@pytest.mark.slow
@for_families
def test_bfloat16_error_is_at_most_that_of_transformers(family):
    """Root mean square errors of both, against torch in float32 with the same bfloat16 parameters.

    Ours may be a tenth larger, because of biases: XLA rounds a product before it adds the bias.
    """
    shape, images = CASES["seven images, four layers"]
    reference = random_reference(small_config(shape.with_family(family)))
    cast(reference, torch.bfloat16)
    prompt = random_prompt(reference.config, list(images))
    half = reference_logits(reference, prompt)
    half_features = reference_features(reference, prompt)
    port = Port(reference, jnp.bfloat16)
    logits, _, _ = port.prefill(prompt)
    in_chunks, _, _ = port.prefill(prompt, packed=True, chunk_rows=(16, 32))
    features = np.asarray(port.image_features(prompt), np.float32)[: len(half_features)]
    assert not np.array_equal(logits, half)

    cast(reference, torch.float32)
    exact, exact_features = (
        reference_logits(reference, prompt),
        reference_features(reference, prompt),
    )

    def error(values: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(np.mean((values - expected) ** 2)))

    assert error(features, exact_features) <= 1.1 * error(half_features, exact_features)
    assert error(logits, exact) <= 1.1 * error(half, exact)
    assert error(in_chunks, exact) <= 1.1 * error(half, exact)
