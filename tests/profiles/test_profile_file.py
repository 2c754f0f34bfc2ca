"""A profile survives its file, and a file or model that does not fit is refused by name."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import LayerFlops
from bsjax.masks.template import Sinks
from bsjax.masks.visibility import Visibility
from bsjax.profiles import profile as profile_file
from bsjax.profiles.evidence import (
    DAMAGE_STATISTICS,
    MEASURED_STATISTICS,
    AttentionFlops,
    Evidence,
    SinkDiscovery,
)
from bsjax.profiles.profile import Profile
from tests.support.paths import ROOT

LAYERS, HEADS = 3, 4


def model(family="qwen2_vl", layers=LAYERS, heads=HEADS, fingerprint="abc"):
    text_config = SimpleNamespace(num_hidden_layers=layers, num_attention_heads=heads)
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text_config),
        family=SimpleNamespace(name=family),
        fingerprint=fingerprint,
    )


def statistics(names=MEASURED_STATISTICS, seed=3):
    """Statistics such as a profiling run could have measured: masses add up to 1."""
    generator = np.random.default_rng(seed)
    values = {name: generator.random((LAYERS, HEADS)) for name in names}
    mass = sum(value for name, value in values.items() if name.startswith("mass"))
    return {
        name: value / mass if name.startswith("mass") else value for name, value in values.items()
    }


KINDS = (
    LayerFlops(Visibility(True, 512), 2, 10**16, 9 * 10**15),
    LayerFlops(Visibility(True), 1, 9 * 10**16, 51 * 10**15),
)
KIND_RECORD = {
    "bidirectional_images": True,
    "window": 512,
    "layers": 2,
    "dense": 10**16,
    "sparse": 9 * 10**15,
}


def evidence(**changes) -> Evidence:
    arguments = {
        "criterion": "output_error",
        "thresholds": {"threshold": 0.3, "quantile": 0.9},
        "sample_count": 64,
        "held_out_count": 21,
        "sample_fingerprint": "def",
        "statistics": statistics(),
        "attention_flops": AttentionFlops(10**17, 6 * 10**16),
        "attention_flops_per_kind": KINDS,
        "sink_discovery": SinkDiscovery("four times the average", (0.5, 0.1, 1e-6)),
        "end_to_end": {"kl_divergence": 1.5e-4, "top_1_agreement": 0.99},
    }
    return Evidence(**(arguments | changes))


def measured(**changes) -> Profile:
    found = statistics()
    errors = np.stack([found[f"error_{name}"] for name in ("SINK", "INTRA_IMAGE")])
    categories = np.where(errors[0] <= 0.3, 1, np.where(errors[1] <= 0.3, 2, 0))
    assert np.unique(categories).tolist() == [0, 1, 2]
    arguments = {
        "family": "qwen2_vl",
        "categories": categories.astype(np.int8),
        "sinks": Sinks(2, (5, 9)),
        "fingerprint": "abc",
        "evidence": evidence(),
        "source": 'a folder of "photographs" – ünïcode',
        "versions": {"bsjax": "0.1.0"},
    }
    return Profile(**(arguments | changes))


def refined() -> Profile:
    return measured(
        categories=np.full((LAYERS, HEADS), 3, np.int8),
        evidence=evidence(
            thresholds={"quantile": 0.9},
            statistics=statistics(MEASURED_STATISTICS + DAMAGE_STATISTICS),
            refinement={"target_reduction": 0.4, "kl": 1e-3},
        ),
    )


def assert_equal(left: Profile, right: Profile):
    np.testing.assert_array_equal(left.categories, right.categories)
    assert left.categories.dtype == right.categories.dtype == np.int8
    for field in dataclasses.fields(Profile):
        if field.name not in ("categories", "evidence"):
            assert getattr(left, field.name) == getattr(right, field.name), field.name
    assert left.from_data == right.from_data
    if left.evidence is None or right.evidence is None:
        return
    assert left.evidence.statistics.keys() == right.evidence.statistics.keys()
    for name in left.evidence.statistics:
        np.testing.assert_array_equal(
            left.evidence.statistics[name], right.evidence.statistics[name]
        )
    for field in dataclasses.fields(Evidence):
        if field.name != "statistics":
            assert getattr(left.evidence, field.name) == getattr(right.evidence, field.name)


def test_a_profile_survives_its_file(tmp_path):
    path = tmp_path / "profile.json"
    measured().save(path)
    assert_equal(Profile.load(path), measured())
    assert_equal(Profile.load(str(path)), measured())
    refined().save(path)
    assert_equal(Profile.load(path), refined())
    alone = measured(evidence=evidence(end_to_end=None, held_out_count=0, sink_discovery=None))
    assert_equal(Profile.from_json(alone.to_json()), alone)


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**32 - 1), st.lists(st.integers(0, 99))
)
def test_any_categories_and_sinks_survive(layers, heads, seed, offsets):
    categories = np.random.default_rng(seed).integers(0, 4, (layers, heads)).astype(np.int8)
    profile = Profile(family="qwen2_vl", categories=categories, sinks=Sinks(3, tuple(offsets)))
    assert_equal(Profile.from_json(profile.to_json()), profile)


def test_the_file_can_be_read_by_people(tmp_path):
    categories = np.array([[0, 1, 2, 3], [3, 3, 2, 0]], np.int8)
    text = Profile(family="qwen2_vl", categories=categories).to_json()
    assert '"categories": [\n    "DSIB",\n    "BBID"\n  ],' in text
    assert '"B": "INTRA_IMAGE_SINK"' in text
    rows = [line.strip() for line in measured().to_json().splitlines()]
    row = json.dumps(evidence().statistics["error_SINK"][1].tolist())
    assert f"{row}," in rows


def test_categories_cannot_be_changed_afterwards():
    categories = np.zeros((1, 2), np.int8)
    profile = Profile(family="qwen2_vl", categories=categories)
    categories[0, 0] = 3
    assert profile.categories[0, 0] == 0
    with pytest.raises(ValueError):
        profile.categories[0, 0] = 3


def test_uniform_says_that_it_does_not_come_from_data():
    profile = Profile.uniform("intra_image_sink", model())
    assert np.all(profile.categories == HeadCategory.INTRA_IMAGE_SINK)
    assert profile.categories.shape == (LAYERS, HEADS)
    assert profile.fingerprint == "abc"
    document = json.loads(profile.to_json())
    assert document["from_data"] is False
    assert "does not come from data" in document["samples"]["source"]
    assert json.loads(measured().to_json())["from_data"] is True
    alone = Profile.uniform(HeadCategory.SINK, family="qwen2_vl", layers=2, heads=5)
    assert (alone.layers, alone.heads, alone.fingerprint) == (2, 5, None)
    learned = Profile.uniform(HeadCategory.SINK, model(), sinks=Sinks(1, (7,)))
    assert learned.sinks == Sinks(1, (7,))


def test_uniform_checks_its_arguments():
    with pytest.raises(ProfileError, match="SPARSE.*INTRA_IMAGE_SINK"):
        Profile.uniform("SPARSE", model())
    with pytest.raises(ProfileError, match="not both"):
        Profile.uniform("SINK", model(), layers=2)
    with pytest.raises(ProfileError, match="layers=None"):
        Profile.uniform("SINK", family="qwen2_vl", heads=2)
    with pytest.raises(ProfileError, match="layers must be at least 1"):
        Profile.uniform("SINK", family="qwen2_vl", layers=0, heads=2)


def test_another_model_is_refused():
    profile = measured()
    profile.check("qwen2_vl", LAYERS, HEADS)
    profile.check("qwen2_vl", LAYERS, HEADS, "abc")
    with pytest.raises(ProfileError, match="for qwen2_vl, the model is gemma3"):
        profile.check("gemma3", LAYERS, HEADS, "abc")
    with pytest.raises(ProfileError, match="3 layers of 4 heads, the model has 5 layers of 4"):
        profile.check("qwen2_vl", 5, HEADS, "abc")
    with pytest.raises(ProfileError, match="3 layers of 4 heads, the model has 3 layers of 8"):
        profile.check("qwen2_vl", LAYERS, 8, "abc")
    with pytest.raises(ProfileError, match="fingerprint abc, the model's is xyz"):
        profile.check("qwen2_vl", LAYERS, HEADS, "xyz")
    Profile(family="qwen2_vl", categories=profile.categories).check(
        "qwen2_vl", LAYERS, HEADS, "xyz"
    )


def test_profiles_files_and_names_resolve_to_profiles(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    measured().save(path)
    assert Profile.resolve(None, model()) is None
    own = measured()
    assert Profile.resolve(own, model()) is own
    assert_equal(Profile.resolve(path, model()), measured())
    assert_equal(Profile.resolve(str(path), model()), measured())
    monkeypatch.chdir(tmp_path)
    assert_equal(Profile.resolve("profile.json", model()), measured())
    for argument in (measured(), path):
        with pytest.raises(ProfileError, match="the model is qwen2_5_vl"):
            Profile.resolve(argument, model("qwen2_5_vl"))
    with pytest.raises(ProfileError, match="missing.json"):
        Profile.resolve("missing.json", model())
    with pytest.raises(ProfileError, match="no shipped profile named 'unknown'"):
        Profile.resolve("unknown", model())
    with pytest.raises(ProfileError, match="got int"):
        Profile.resolve(3, model())


def test_shipped_profiles_are_found_by_name(tmp_path, monkeypatch):
    measured().save(tmp_path / "some-model.json")
    (tmp_path / "README.md").write_text("no profile")
    monkeypatch.setattr(profile_file, "shipped_folder", lambda: tmp_path)
    assert profile_file.shipped_names() == ("some-model",)
    assert_equal(Profile.resolve("some-model", model()), measured())
    with pytest.raises(ProfileError, match="shipped profiles are some-model"):
        Profile.resolve("other-model", model())


def test_every_shipped_profile_is_measured_and_saves_to_the_same_bytes():
    assert profile_file.shipped_names()
    for name in profile_file.shipped_names():
        profile = profile_file.shipped(name)
        assert profile.from_data
        assert profile.to_json() == (ROOT / "profiles" / f"{name}.json").read_text("utf-8")


def test_a_profile_is_saved_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    measured().save(path)
    before = path.read_bytes()

    def interrupted(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(profile_file.os, "replace", interrupted)
    with pytest.raises(ProfileError, match="disk full"):
        Profile.uniform("SINK", model()).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ProfileError, match="cannot be written"):
        measured().save(tmp_path / "no folder" / "profile.json")


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="missing.json cannot be read"):
        Profile.load(tmp_path / "missing.json")
    path = tmp_path / "profile.json"
    for content, word in (
        (b"", "not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1, 2]", "not a profile"),
        (b'{"family": "qwen2_vl"}', "not a profile"),
        (b"[" * 100_000, "not JSON"),
        (measured().to_json()[:300].encode(), "not JSON"),
        (measured().to_json().replace("0.99", "NaN").encode(), "NaN"),
        (measured().to_json().replace('"quantile"', '"threshold"').encode(), "`threshold` appears"),
    ):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match=word) as caught:
            Profile.load(path)
        assert str(path) in str(caught.value)


SAMPLES = {"count": 4, "held_out": 2, "source": "", "fingerprint": "def"}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format_version", 2, "`format_version` is 2"),
        ("format_version", True, "`format_version`"),
        ("family", 3, "`family` must be text"),
        ("family", "", "`family`"),
        ("checkpoint_fingerprint", 3, "`checkpoint_fingerprint` must be text"),
        ("checkpoint_fingerprint", "", "`fingerprint`"),
        ("checkpoint_fingerprint", None, "no `checkpoint_fingerprint`"),
        ("layers", 2, "`categories` has 3 rows, but `layers` is 2"),
        ("layers", "3", "`layers` must be a whole number"),
        ("heads", 5, "has 4 letters, but `heads` is 5"),
        ("heads", 0, "`heads` must be a whole number from 1"),
        ("sinks", {"first": 1}, "`sinks` lacks `offsets`"),
        ("sinks", {"first": 0, "offsets": []}, "`first` must be at least 1"),
        ("sinks", {"first": 1, "offsets": [-1]}, "`sinks.offsets`"),
        ("sinks", {"first": 1, "offsets": 3}, "`sinks.offsets` must be a list"),
        ("sinks", {"first": 1, "offsets": [], "last": 1}, "`last`"),
        ("sinks", None, "`sinks` must be an object"),
        ("from_data", False, "`from_data` is false"),
        ("from_data", "yes", "`from_data` must be true or false"),
        ("criterion", "uniform", "`from_data` is true and `criterion` is 'uniform'"),
        ("criterion", "guess", "`criterion` must be one of output_error, mass, uniform, by_hand"),
        ("thresholds", {"threshold": "small"}, "`thresholds.threshold`"),
        ("thresholds", {"quantile": 0.9}, "lack `threshold`"),
        ("thresholds", {"threshold": 0.1}, "above the threshold of 0.1: these categories do not"),
        ("categories", ["BBBB"] * 3, "above the threshold of 0.3: these categories do not"),
        ("thresholds", [], "`thresholds` must be an object"),
        ("samples", SAMPLES | {"count": 0}, "`sample_count` must be at least 1, got 0"),
        ("samples", SAMPLES | {"count": 1.5}, "`samples.count`"),
        ("samples", SAMPLES | {"held_out": -1}, "`samples.held_out`"),
        ("samples", SAMPLES | {"held_out": 0}, "0 held-out samples contradict"),
        ("samples", SAMPLES | {"fingerprint": None}, "no `samples.fingerprint`"),
        ("samples", SAMPLES | {"fingerprint": 3}, "`samples.fingerprint` must be text"),
        ("samples", {"count": 1}, "`samples` lacks `held_out`, `source`"),
        ("attention_flops", None, "no `attention_flops`"),
        ("attention_flops", {"dense": 2, "sparse": 1}, "dense, sparse and reduction"),
        (
            "attention_flops",
            {"dense": 2, "sparse": 1, "reduction": 0.6},
            "is not a reduction by 0.6",
        ),
        (
            "attention_flops",
            {"dense": 2, "sparse": 3, "reduction": -0.5},
            "`sparse` must be .* got 3 of 2",
        ),
        ("attention_flops_per_kind", {}, "list of objects"),
        ("attention_flops_per_kind", [3], "must be an object"),
        ("attention_flops_per_kind", [{"window": 3}], "lacks `bidirectional_images`, `layers`"),
        (
            "attention_flops_per_kind",
            [KIND_RECORD | {"window": 0}],
            "per_kind.window` must be a whole number from 1",
        ),
        ("attention_flops_per_kind", [KIND_RECORD], "adds up to .* in 2 layers"),
        ("sink_discovery", {"rule": "guessed"}, "`sink_discovery` lacks `mass_by_offset`"),
        ("sink_discovery", {"rule": "guessed", "mass_by_offset": "much"}, "list of numbers"),
        ("sink_discovery", [], "`sink_discovery` must be an object"),
        ("refinement", {"kl": "small"}, "`refinement.kl`"),
        ("refinement", {"kl": 0.1}, "missing: damage_INTRA_IMAGE, damage_INTRA_IMAGE_SINK"),
        ("category_letters", {"D": "SINK"}, "`category_letters` must be"),
        ("categories", ["DDDD", "DDDD", "DDXD"], r"`categories\[2\]` has the letter 'X'"),
        ("categories", ["DDDD", "DDD", "DDDD"], r"`categories\[1\]` has 3 letters"),
        ("categories", [[0, 0, 0, 0]] * 3, "rows of letters"),
        ("categories", "DDDD", "rows of letters"),
        ("statistics", {"mass": [[1, 2, 3, 4]] * 3}, "unknown: mass"),
        ("statistics", {}, "missing: error_INTRA_IMAGE, .*unknown: none"),
        ("statistics", {"mass": [[1, 2, 3, 4]]}, "`statistics.mass` must have 3 rows of 4"),
        ("statistics", {"mass": [[1, 2, 3, "4"]] * 3}, "`statistics.mass` must hold finite"),
        ("end_to_end", {"kl_divergence": True}, "`end_to_end.kl_divergence`"),
        ("versions", {"jax": 12}, "`versions.jax` must be text"),
        ("comment", "hello", "`comment`, which format version 1 does not have"),
    ],
)
def test_a_wrong_field_is_named(field, value, words):
    document = json.loads(measured().to_json())
    document[field] = value
    with pytest.raises(ProfileError, match=words):
        Profile.from_json(json.dumps(document))


def test_no_field_may_be_missing():
    document = json.loads(measured().to_json())
    for field in document:
        lacking = copy.deepcopy(document)
        del lacking[field]
        with pytest.raises(ProfileError, match=f"`{field}`|format"):
            Profile.from_json(json.dumps(lacking))


def test_values_that_no_file_could_hold_are_refused():
    for arguments, word in (
        ({"categories": np.full((2, 2), 4, np.int8)}, "0 to 3"),
        ({"categories": np.zeros((0, 2), np.int8)}, "one row per layer"),
    ):
        with pytest.raises(ProfileError, match=word):
            Profile(family="qwen2_vl", **arguments)


MEASUREMENTS = {
    "samples.count": 3,
    "samples.held_out": 3,
    "samples.fingerprint": "abc",
    "thresholds": {"threshold": 0.1},
    "statistics": {"mass_TEXT": np.ones((LAYERS, HEADS)).tolist()},
    "attention_flops": {"dense": 2, "sparse": 1, "reduction": 0.5},
    "attention_flops_per_kind": [KIND_RECORD],
    "sink_discovery": {"rule": "", "mass_by_offset": []},
    "refinement": {"kl": 0.0},
    "end_to_end": {"kl_divergence": 0.0},
}


@pytest.mark.parametrize("field", MEASUREMENTS)
def test_a_file_without_data_cannot_look_measured(field):
    by_hand = Profile(family="qwen2_vl", categories=measured().categories)
    assert not by_hand.from_data
    document = json.loads(by_hand.to_json())
    assert document["from_data"] is False
    parent, _, name = field.rpartition(".")
    (document[parent] if parent else document)[name] = MEASUREMENTS[field]
    with pytest.raises(ProfileError, match=f"does not come from data, but it has `{field}`"):
        Profile.from_json(json.dumps(document))


def test_evidence_that_contradicts_itself_is_refused():
    ones = np.ones((LAYERS, HEADS))
    for changes, words in (
        ({"criterion": "by_hand"}, "`criterion` of evidence must be one of output_error, mass"),
        ({"end_to_end": None}, "21 held-out samples contradict"),
        ({"held_out_count": 0}, "0 held-out samples contradict"),
        ({"sample_count": 0}, "`sample_count` must be at least 1"),
        ({"statistics": statistics() | {"mass_OTHER": ones}}, "must add up to 1"),
        ({"statistics": statistics() | {"error_SINK": -ones}}, "below 0"),
        ({"statistics": statistics() | {"error_SINK": np.inf * ones}}, "not finite"),
        ({"statistics": statistics() | {"error_SINK": ones[:1]}}, r"has the shape \(1, 4\)"),
        ({"statistics": statistics() | {"mass": ones}}, "unknown: mass"),
        ({"thresholds": {"threshold": float("nan")}}, "`thresholds.threshold` must be a finite"),
    ):
        with pytest.raises(ProfileError, match=words):
            evidence(**changes)
    for flops in ((2, 3), (2, 0)):
        with pytest.raises(ProfileError, match="`sparse` must be above 0 and at most `dense`"):
            AttentionFlops(*flops)


def test_evidence_for_other_categories_is_refused():
    with pytest.raises(ProfileError, match=r"one number per layer and head, \(2, 4\), got"):
        measured(categories=measured().categories[:2])
    with pytest.raises(ProfileError, match="above the threshold of 0.3"):
        measured(categories=np.full((LAYERS, HEADS), 3, np.int8))
    with pytest.raises(ProfileError, match="needs the `fingerprint` of its checkpoint"):
        measured(fingerprint=None)


def test_numpy_numbers_become_python_numbers():
    found = evidence(thresholds={"threshold": np.float64(0.5), "quantile": 1})
    assert found.thresholds == {"threshold": 0.5, "quantile": 1}
    assert [type(value) for value in found.thresholds.values()] == [float, int]


def test_uniform_means_one_category():
    mixed = Profile(family="qwen2_vl", categories=np.eye(2, dtype=np.int8))
    assert mixed.criterion == "by_hand"
    assert Profile.uniform("SINK", model()).criterion == "uniform"
    document = json.loads(mixed.to_json()) | {"criterion": "uniform"}
    with pytest.raises(ProfileError, match="'by_hand'"):
        Profile.from_json(json.dumps(document))


def test_a_profile_set_by_hand_to_one_category_keeps_its_criterion():
    same = Profile(family="qwen2_vl", categories=np.ones((2, 2), np.int8))
    assert same.criterion == "by_hand"
    assert Profile.from_json(same.to_json()).to_json() == same.to_json()
    uniform = Profile.uniform("SINK", model())
    assert Profile.from_json(uniform.to_json()).to_json() == uniform.to_json()
    with pytest.raises(ProfileError, match="'by_hand'"):
        Profile(family="qwen2_vl", categories=np.eye(2, dtype=np.int8), is_uniform=True)


@pytest.mark.parametrize("name", ["attention_flops", "refinement", "end_to_end"])
def test_empty_measurements_of_a_profile_set_by_hand_are_refused(name):
    document = json.loads(Profile.uniform("SINK", model()).to_json()) | {name: {}}
    with pytest.raises(ProfileError, match=f"but it has `{name}`"):
        Profile.from_json(json.dumps(document))


def test_attention_flops_are_numbers():
    with pytest.raises(ProfileError, match="`attention_flops.dense` must be a finite number"):
        AttentionFlops(float("nan"), 1)
