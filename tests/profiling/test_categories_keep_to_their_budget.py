"""Categories chosen from measurements keep to the threshold, and to the FLOPs asked for."""

import dataclasses
import itertools

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bsjax
from bsjax import HeadCategory, Image, ProfileError, Sinks, Template, Text
from bsjax.masks.flops import total_flops
from bsjax.masks.visibility import Visibility
from bsjax.profiling import GROUPS, SPARSE_CATEGORIES, Measurements
from bsjax.profiling.knapsack import apply_moves, greedy_path
from bsjax.profiling.ordered_samples import OrderedSamples, fingerprint
from bsjax.profiling.prompt_inputs import Shape
from bsjax.profiling.selection import missing_mass
from bsjax.profiling.settings import Divergence, Reduction, Settings, Threshold
from tests.support.templates import visible_matrix

LAYERS, HEADS, COUNT = 3, 4, 5


def measurements(seed=0, flops=None):
    generator = np.random.default_rng(seed)
    mass = generator.random((COUNT, LAYERS, HEADS, len(GROUPS))).astype(np.float32)
    if flops is None:
        flops = np.sort(generator.integers(1, 10**12, (LAYERS, 4)), axis=1)[:, [3, 0, 1, 2]]
    return Measurements(
        sinks=Sinks(),
        mass=mass / mass.sum(axis=-1, keepdims=True),
        # Errors are unbounded: what a category leaves out may point away from what it keeps.
        error=3 * generator.random((COUNT, LAYERS, HEADS, 3)).astype(np.float32),
        flops=np.asarray(flops, np.int64),
        fingerprints=tuple("abcde"),
        images=np.full(COUNT, 2),
    )


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.sampled_from(["output_error", "mass"]), st.floats(0, 1), st.floats(0, 1))
def test_each_head_is_as_cheap_as_its_threshold_allows(seed, criterion, threshold, quantile):
    found = measurements(seed)
    threshold *= 3 if criterion == "output_error" else 1
    chosen = found.one_shot(threshold, criterion=criterion, quantile=quantile)
    values = found.error.astype(np.float64)
    if criterion == "mass":
        values = missing_mass(found.mass)
    within = (values <= threshold).mean(axis=0) >= quantile - 1e-9
    # The least value that the share does not exceed is a sample's, at quantile 0 too.
    within &= (values <= threshold).any(axis=0)
    for layer, head in itertools.product(range(LAYERS), range(HEADS)):
        allowed = [0] + [c for c in SPARSE_CATEGORIES if within[layer, head, c - 1]]
        cheapest = min(allowed, key=lambda category: found.flops[layer, category])
        assert chosen[layer, head] == cheapest


def test_what_is_dropped_is_what_the_category_does_not_see():
    mass = np.asarray([0.1, 0.2, 0.3, 0.15, 0.25])  # TEXT, OWN_SINK, OWN, OTHER_SINK, OTHER
    np.testing.assert_allclose(missing_mass(mass), [0.55, 0.4, 0.25])


def test_equal_flops_keep_the_head_dense():
    found = measurements(flops=np.full((LAYERS, 4), 7))
    assert not found.one_shot(3.0).any()


def test_dropped_mass_is_a_share_in_spite_of_rounding():
    """Otherwise the file and `one_shot` could reject the least threshold for a reduction."""
    mass = np.zeros((COUNT, LAYERS, HEADS, len(GROUPS)), np.float32)
    mass[..., [2, 4]] = 0.5000001
    found = dataclasses.replace(measurements(), mass=mass)
    threshold = found.threshold_for(0.001, criterion="mass")
    assert missing_mass(mass).max() == 1
    assert 0 <= threshold <= 1
    found.one_shot(threshold, criterion="mass")


@pytest.mark.parametrize("criterion", ["output_error", "mass"])
def test_samples_of_one_image_say_nothing_about_other_images(criterion):
    """Their INTRA_IMAGE error is 0 for every head, which would pass for a small error."""
    found = measurements()
    error, mass = found.error.copy(), found.mass.copy()
    error[[1, 3, 4], ..., 1:] = 0
    mass[[1, 3, 4], ..., 3:] = 0
    images = np.asarray([2, 1, 3, 1, 1])
    diluted = dataclasses.replace(found, error=error, mass=mass, images=images)
    several = dataclasses.replace(
        found, error=error[[0, 2]], mass=mass[[0, 2]], images=images[[0, 2]]
    )
    np.testing.assert_array_equal(diluted.damage(criterion, 0.5), several.damage(criterion, 0.5))
    for name, values in several.statistics().items():
        np.testing.assert_array_equal(diluted.statistics()[name], values)
    with pytest.raises(ProfileError, match="two images or more"):
        dataclasses.replace(found, images=np.ones(COUNT, np.int64)).damage(criterion)


@pytest.mark.parametrize(
    ("criterion", "threshold"),
    [
        ("mass", 1.5),
        ("mass", -0.1),
        ("output_error", -0.1),
        ("output_error", float("inf")),
        ("output_error", float("nan")),
        ("output_error", 10**400),
        ("output_error", "0.1"),
        ("mass", "0.1"),
    ],
)
def test_thresholds_out_of_range_are_refused(annotations_unchecked, criterion, threshold):
    with pytest.raises(ProfileError, match="threshold must be"):
        Settings(Threshold(threshold), criterion=criterion)


@pytest.mark.parametrize("value", ["0.1", None, 0.0, -1, float("nan"), float("inf"), 10**400])
def test_divergences_out_of_range_are_refused(annotations_unchecked, value):
    with pytest.raises(ProfileError, match="max_kl must be a number of nats above 0"):
        Divergence(value)


@pytest.mark.parametrize("value", ["0.1", None, 0.0, 1, -1, True, float("nan"), float("inf")])
def test_reductions_out_of_range_are_refused(annotations_unchecked, value):
    with pytest.raises(ProfileError, match="target_reduction must be a share between 0 and 1"):
        Reduction(value)


@given(seeds, st.floats(0.01, 0.99), st.sampled_from(["output_error", "mass"]))
def test_the_budget_is_met_by_the_least_threshold(seed, target, criterion):
    found = measurements(seed)
    above_all = 3.0 if criterion == "output_error" else 1.0
    most = found.reduction(found.one_shot(above_all, criterion=criterion))
    if most < target:
        with pytest.raises(ProfileError, match=f"fall by {most:.1%}"):
            found.one_shot(target_reduction=target, criterion=criterion)
        return
    threshold = found.threshold_for(target, criterion=criterion)
    chosen = found.one_shot(target_reduction=target, criterion=criterion)
    np.testing.assert_array_equal(chosen, found.one_shot(threshold, criterion=criterion))
    assert found.reduction(chosen) >= target
    below = found.one_shot(np.nextafter(threshold, 0), criterion=criterion)
    assert found.reduction(below) < target


def test_flops_are_counted_by_kind_of_layer():
    template = Template.from_segments([Text(3), Image(9), Text(2), Image(7), Image(5), Text(4)])
    kinds = (Visibility(True, 6), Visibility(True, None))
    shape = Shape(3, 2, 16, kinds, np.asarray([0, 1, 0], np.int32))
    flops = shape.category_flops(template)
    for layer, kind in enumerate((0, 1, 0)):
        for category in HeadCategory:
            seen = visible_matrix(template, category.groups, kinds[kind])
            # In the last layer only the last token has a query.
            counted = seen[-1:] if layer == 2 else seen
            assert flops[layer, category] == 4 * 16 * counted.sum()
    assert flops[0, 0] < flops[1, 0]
    assert set(flops[2]) == {4 * 16 * 6}
    categories = np.asarray([[1, 0], [2, 3], [0, 0]], np.int8)
    expected = sum(flops[layer, c] for layer, row in enumerate(categories) for c in row)
    assert total_flops(categories, flops) == expected


@given(seeds)
def test_the_path_is_nested_and_does_the_least_damage(seed):
    """Compared with all choices for two layers of one head: no mixture of two beats the path."""
    generator = np.random.default_rng(seed)
    flops = np.concatenate([np.full((2, 1), 100), generator.integers(1, 101, (2, 3))], axis=1)
    damage = generator.random((2, 1, 3)) * generator.integers(0, 2, (2, 1, 3))

    def point(categories):
        categories = list(categories)
        kl = sum(0.0 if c == 0 else damage[layer, 0, c - 1] for layer, (c,) in categories)
        saved = sum(100 - flops[layer, c] for layer, (c,) in categories)
        return saved, kl

    dense = np.zeros((2, 1), np.int8)
    moves = greedy_path(damage, flops)
    corners = [point(enumerate(apply_moves(moves[:n], dense))) for n in range(len(moves) + 1)]
    assert all(move.saved > 0 for move in moves)
    assert [move.slope for move in moves] == sorted(move.slope for move in moves)
    for layer in range(2):
        own = [move for move in moves if move.layer == layer]
        assert all(b.before == a.after for a, b in itertools.pairwise(own))
    every = [point(enumerate([(a,), (b,)])) for a, b in itertools.product(range(4), range(4))]
    assert corners[-1][0] == max(saved for saved, _ in every)
    for saved, kl in every:
        for (left, low), (right, high) in itertools.pairwise(corners):
            if left <= saved <= right:
                on_path = low + (high - low) * (saved - left) / (right - left)
                assert kl >= on_path - 1e-9


def test_equal_samples_count_once(tmp_path):
    """If one of two equal samples were held out, the other would still take part in the choice."""
    one, two = ([{"role": "user", "content": text}] for text in "ab")
    assert OrderedSamples.of([one, two, list(one)]).messages in ((one, two), (two, one))
    described = bsjax.Samples([one, two, one], "from somewhere")
    assert OrderedSamples.of(described)[:2] == OrderedSamples.of([two, one])[:2]


def test_texts_are_not_file_names_and_palettes_matter(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("one")
    text = [{"role": "user", "content": [{"type": "text", "text": str(path)}, str(path)]}]
    plain = [{"role": "user", "content": str(path)}]
    before = fingerprint(text), fingerprint(plain)
    path.write_text("two")
    assert (fingerprint(text), fingerprint(plain)) == before

    red, blue = (PIL.Image.new("P", (2, 2)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    image = [[{"role": "user", "content": [{"type": "image", "image": i}]}] for i in (red, blue)]
    assert fingerprint(image[0]) != fingerprint(image[1])


def test_samples_are_told_apart_by_content(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

    def one(image, text="a"):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    path = tmp_path / "image.png"
    path.write_bytes(b"first")
    other = tmp_path / "copy.png"
    other.write_bytes(b"first")
    same = fingerprint(one(str(path)))
    assert same == fingerprint(one(other))
    other.write_bytes(b"second")
    different = [one(other), one(pixels), one(pixels + 1), one(pixels, "b"), one(pixels.T)]
    assert len({same, *map(fingerprint, different)}) == 6
    ordered = OrderedSamples.of([one(pixels), one(pixels + 1), one(pixels, "b"), one(other)])
    again = OrderedSamples.of([one(other), one(pixels, "b"), one(pixels + 1), one(pixels)])
    assert ordered.fingerprints == again.fingerprints
    for seed in range(3):
        chosen, held = ordered.split(0.25, seed)
        assert (len(chosen.messages), len(held.messages)) == (3, 1)
        assert sorted(chosen.fingerprints + held.fingerprints) == list(ordered.fingerprints)
        assert again.split(0.25, seed)[1].fingerprints == held.fingerprints
    assert len({ordered.split(0.25, seed)[1].fingerprints for seed in range(20)}) > 1
    for wrong, words in (
        (one(pixels), "single conversation"),
        ("samples.jsonl", "got str"),
        (iter([]), "got list_iterator"),
        ([], "no samples"),
    ):
        with pytest.raises(ProfileError, match=words):
            OrderedSamples.of(wrong)
    assert not ordered.split(0.0, 0)[1]
    assert len(ordered.split(0.99, 0)[0].messages) == 1
