"""Positions, patch order and window order equal those of transformers."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax.errors import CapacityError, TemplateError
from bsjax.models import FAMILIES
from bsjax.models.gemma3.vision_plan import pooled_side, to_images
from bsjax.models.pixels import Pixels, PixelScale, cut_into_patches, pixel_values_of
from tests.support.parity import torch
from tests.support.small_models import (
    IMAGE,
    VIDEO,
    Shape,
    random_prompt,
    random_reference,
    small_config,
)

FAMILY_NAMES = ("qwen2_vl", "qwen2_5_vl")
CONFIGS = {family: small_config(Shape(family, layers=1, vision_depth=1)) for family in FAMILY_NAMES}

for_families = pytest.mark.parametrize("family", FAMILY_NAMES)
sizes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=6)


@cache
def reference(family: str):
    return random_reference(CONFIGS[family])


@pytest.mark.parity
@for_families
@settings(deadline=None, max_examples=50)
@given(sizes=sizes, seed=st.integers(0, 1000))
def test_positions_equal_transformers(family, sizes, seed):
    config = CONFIGS[family]
    prompt = random_prompt(config, sizes, seed=seed)
    ours, next_position = FAMILIES[family].positions(prompt.token_ids, prompt.grid_thw, config)
    ids = torch.tensor(prompt.token_ids, dtype=torch.long)[None]
    expected, delta = reference(family).model.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=torch.tensor(prompt.grid_thw)
    )
    np.testing.assert_array_equal(ours, expected[:, 0])
    assert next_position == int(delta) + len(prompt.token_ids)


@for_families
@settings(deadline=None, max_examples=25)
@given(sizes=sizes.filter(len))
def test_adjacent_images_are_told_apart_by_their_grids(family, sizes):
    config, positions = CONFIGS[family], FAMILIES[family].positions
    adjacent = random_prompt(config, sizes, adjacent=True)
    ours, next_position = positions(adjacent.token_ids, adjacent.grid_thw, config)

    # A text token before each image but the first moves everything after it by one.
    pieces = np.cumsum(adjacent.image_tokens)[:-1]
    first = int(np.argmax(adjacent.token_ids == IMAGE))
    between = first + pieces
    apart = np.insert(adjacent.token_ids, between, 1)
    expected, next_apart = positions(apart, adjacent.grid_thw, config)
    expected = np.delete(expected, between + np.arange(len(between)), axis=1)
    later = np.searchsorted(between, np.arange(len(adjacent.token_ids)), side="right")
    np.testing.assert_array_equal(ours, expected - later)
    assert next_position == next_apart - len(between)


@for_families
def test_prompts_that_are_refused(family):
    config, positions = CONFIGS[family], FAMILIES[family].positions
    grid = np.asarray([[1, 4, 4]])
    with pytest.raises(TemplateError, match="2 video tokens"):
        positions(np.asarray([1, VIDEO, VIDEO, 2]), np.zeros((0, 3), np.int64), config)
    with pytest.raises(TemplateError, match="holds 3 image tokens"):
        positions(np.asarray([1, IMAGE, IMAGE, IMAGE]), grid, config)
    with pytest.raises(TemplateError, match="Image 0 should have 4 tokens from token 0"):
        positions(np.asarray([IMAGE, IMAGE, 1, IMAGE, IMAGE]), grid, config)


@for_families
def test_grids_that_are_refused(family):
    config, plan = CONFIGS[family], FAMILIES[family].vision_plan
    blocks = {"block_q": 16, "block_kv": 16}
    with pytest.raises(TemplateError, match="Image 1 has the patch grid"):
        plan(np.asarray([[1, 4, 4], [1, 4, 3]]), config, patches=64, **blocks)
    for patches in (12, 18):
        with pytest.raises(CapacityError, match=f"16 patches; a plan of {patches} rows"):
            plan(np.asarray([[1, 4, 4]]), config, patches=patches, **blocks)


@pytest.mark.parity
@for_families
@settings(deadline=None, max_examples=50)
@given(sizes=sizes.filter(len), frames=st.integers(1, 2))
def test_rows_of_the_vision_tower_equal_transformers(family, sizes, frames):
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    config = CONFIGS[family]
    vision = config.vision_config
    grid = np.asarray([(frames, 2 * rows, 2 * columns) for rows, columns in sizes])
    patches = int(grid.prod(axis=1).sum())
    padded = patches + 12
    plan = FAMILIES[family].vision_plan(grid, config, patches=padded, block_q=16, block_kv=16)

    expected = get_vision_position_ids(torch.tensor(grid), vision.spatial_merge_size).numpy()
    frame_of_row = np.repeat(
        np.arange(len(grid) * frames), np.repeat(grid[:, 1] * grid[:, 2], grid[:, 0])
    )
    if family == "qwen2_5_vl":
        index, window_ends = get_vision_window_index(
            torch.tensor(grid), vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        unit = vision.spatial_merge_size**2
        order = (index.numpy()[:, None] * unit + np.arange(unit)).reshape(-1)
        np.testing.assert_array_equal(plan.order[:patches], order)
        np.testing.assert_array_equal(plan.order[patches:], np.arange(patches, padded))
        np.testing.assert_array_equal(
            plan.merged_row[plan.order[::unit] // unit], np.arange(padded // unit)
        )
        windows = np.repeat(np.arange(len(window_ends) - 1), np.diff(window_ends))
        np.testing.assert_array_equal(plan.window_schedule.queries.image[:patches], windows)
        expected = expected[order]
    np.testing.assert_array_equal(plan.positions[:patches], expected)
    np.testing.assert_array_equal(plan.schedule.queries.image[:patches], frame_of_row)
    assert (plan.schedule.queries.image[patches:] == -1).all()


@settings(deadline=None, max_examples=20)
@given(images=st.integers(0, 4), seed=st.integers(0, 100))
def test_positions_of_gemma3_count_tokens(images, seed):
    config = small_config(Shape("gemma3"))
    prompt = random_prompt(config, [(1, 1)] * images, seed=seed)
    ours, following = FAMILIES["gemma3"].positions(prompt.token_ids, prompt.grid_thw, config)
    np.testing.assert_array_equal(ours, [np.arange(len(prompt.token_ids))])
    assert following == len(prompt.token_ids)


def test_prompts_and_grids_of_gemma3_that_are_refused():
    config = small_config(Shape("gemma3"))
    positions, plan = FAMILIES["gemma3"].positions, FAMILIES["gemma3"].vision_plan
    grid = np.asarray([[1, 8, 8]])
    with pytest.raises(TemplateError, match="holds 3 image tokens"):
        positions(np.asarray([1, *[IMAGE] * 3]), grid, config)
    with pytest.raises(TemplateError, match="Image 0 should have 16 tokens from token 0"):
        positions(np.asarray([*[IMAGE] * 8, 1, *[IMAGE] * 8]), grid, config)
    blocks = {"block_q": 16, "block_kv": 16}
    with pytest.raises(TemplateError, match="Image 1 has the patch grid"):
        plan(np.asarray([[1, 8, 8], [1, 8, 4]]), config, patches=256, **blocks)
    for patches in (60, 66):
        with pytest.raises(CapacityError, match=f"64 patches; a plan of {patches} rows"):
            plan(grid, config, patches=patches, **blocks)


@given(images=st.integers(1, 3), side=st.sampled_from([4, 8]), seed=st.integers(0, 9))
def test_patches_of_gemma3_are_the_image(images, side, seed):
    """Pooled blocks are contiguous, and every pixel is where its position says."""
    config = small_config(Shape("gemma3", image_side=side))
    shape = (images, 4 * side, 4 * side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    cut = np.concatenate([cut_into_patches(image, 4, pooled_side(config)) for image in pixels])
    scale = PixelScale(np.ones(3, np.float32), np.zeros(3, np.float32))
    patches = pixel_values_of(Pixels(cut, scale))
    pixels = np.moveaxis(pixels, -1, 1)
    np.testing.assert_array_equal(to_images(patches, config), pixels)
    plan = FAMILIES["gemma3"].vision_plan(
        np.asarray([[1, side, side]] * images), config, patches=len(patches), block_q=16,
        block_kv=16,
    )  # fmt: skip
    row, column = np.divmod(plan.position, side)
    for patch in (0, 1, len(patches) - 1):
        top, left = 4 * row[patch], 4 * column[patch]
        expected = pixels[patch // side**2, :, top : top + 4, left : left + 4]
        np.testing.assert_array_equal(patches[patch], expected.reshape(-1))
    blocks = np.stack([row // 2, column // 2], axis=1).reshape(-1, 4, 2)
    assert (blocks == blocks[:, :1]).all()
