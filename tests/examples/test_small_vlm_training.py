"""The training data are what they claim to be, and training computes what bsjax computes."""

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from bsjax.masks.categories import HeadCategory
from bsjax.models import FAMILIES, Architecture
from bsjax.models.pixels import pixel_values_of
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Processor
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.programs import Programs
from examples.train_small_vlm import forward, loss, scenes, training
from examples.train_small_vlm.batches import Encoder
from examples.train_small_vlm.export import export
from examples.train_small_vlm.files import make_config, make_image_processor, make_tokenizer
from examples.train_small_vlm.questions import TASKS, ask
from examples.train_small_vlm.scenes import COLOURS, CONTENTS, LABELS, draw_scene
from tests.support.chunks import logits_of


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer):
    return make_config(tokenizer)


@pytest.fixture(scope="module")
def encoder(config, tokenizer):
    processor = make_image_processor()
    return Encoder(config, tokenizer, processor.image_mean, processor.image_std)


@pytest.fixture(scope="module")
def module(config):
    return FAMILIES[config.model_type].build(config, jnp.float32)


@pytest.fixture(scope="module")
def programs(module):
    return Programs(module)


def conversation(scene, question):
    images = [
        {"type": "image", "image": Image.fromarray(picture.pixels)} for picture in scene.pictures
    ]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]


def test_no_digit_is_used_for_both_training_and_testing():
    for train, test in zip(scenes.digit_images(False), scenes.digit_images(True), strict=True):
        assert len(train) > 80 and len(test) > 30
        seen = {digit.tobytes() for digit in train}
        # A few digits of scikit-learn are equal pixel by pixel; none of these is in both sets.
        assert not [digit for digit in test if digit.tobytes() in seen]


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    """Answers are checked against the scene by separate rules, from the question's text alone."""
    random = np.random.default_rng(0)
    answers = Counter()
    for _ in range(300):
        scene = draw_scene(random, int(random.integers(1, 13)), test=bool(random.integers(2)))
        scene = dataclasses.replace(scene, first_label=int(random.integers(4)))
        question = ask(random, scene, task)
        words = question.text.strip("?").split()
        of_colour = any(word in COLOURS or word in ("colour", "coloured") for word in words)
        values = scene.colours if of_colour else scene.contents
        by_label = dict(zip(scene.labels, values, strict=True))
        match question.task:
            case "content" | "colour":
                expected = by_label[words[-1]]
            case "find":
                where = [label for label, value in by_label.items() if value == words[-1]]
                assert len(where) < 2
                expected = f" {where[0]}" if where else "none"
            case "count":
                expected = str(values.count(words[-1]))
            case "compare":
                expected = "yes" if by_label[words[2]] == by_label[words[-1]] else "no"
            case _:
                again = [value for i, value in enumerate(values) if value in values[:i]]
                assert len(again) < 2
                expected = again[0] if again else "none"
        assert question.answer == expected, question
        assert question.feature == ("colour" if of_colour else "content")
        assert all(values[image] == values[question.images[0]] for image in question.images)
        if question.task == task:
            answers[expected] += 1
    # No answer is right so often that a model could always give it.
    assert answers.total() > 100 and max(answers.values()) < 0.6 * answers.total()


def test_every_name_is_one_token(tokenizer):
    labels = [f" {label}" for label in LABELS]
    for name in (*CONTENTS, *COLOURS, *labels, "image", "yes", "no", "none"):
        assert len(tokenizer(name)["input_ids"]) == 1, name


def test_captions_and_counts_are_those_of_the_scene(encoder, tokenizer):
    random = np.random.default_rng(6)
    scene = draw_scene(random, 6, test=False)
    one = encoder.encode(scene, [], 320)
    assert one is not None
    said = [[tokenizer.decode([token]) for token in image] for image in one.captions]
    assert said == [[picture.content, picture.colour] for picture in scene.pictures]
    for number, last in enumerate(one.last_rows):
        assert one.image[last] == number and one.image[last + 1] == -1
        assert one.alike[number].tolist() == [
            names[:number].count(names[number]) for names in (scene.contents, scene.colours)
        ]


def test_patches_are_those_of_the_image_processor(encoder):
    processor = make_image_processor()
    random = np.random.default_rng(1)
    for height, width in Encoder.sizes:
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        expected = processor(images=[Image.fromarray(pixels)], return_tensors="np")["pixel_values"]
        ours = encoder.patches(pixels)
        np.testing.assert_allclose(ours[: len(expected)], expected, atol=1e-5)
        assert not ours[len(expected) :].any()


@pytest.mark.slow
@pytest.mark.parametrize("category", [HeadCategory.DENSE, HeadCategory.SINK, None])
def test_training_computes_what_inference_computes(
    module, programs, config, encoder, tokenizer, category
):
    """A question's hidden states in a batch equal those of its prompt alone, in all categories."""
    random = np.random.default_rng(2)
    scene = draw_scene(random, 4, test=False)
    questions = [ask(random, scene) for _ in range(3)]
    one = encoder.encode(scene, questions, 288)
    assert one is not None
    batch = jax.tree.map(lambda part: part[None], one)
    text = config.text_config
    shape = (text.num_hidden_layers, text.num_attention_heads)
    categories = random.integers(0, 4, shape).astype(np.int8)
    if category is not None:
        categories[:] = category
    groups = np.vectorize(lambda value: HeadCategory(value).groups.value)(categories)
    features = forward.image_features(module, batch, encoder.plans)
    hidden, _ = forward.hidden_states(module, batch, features, jnp.asarray(groups))
    logits = module.logits(hidden[0][one.answer_rows[:, 0]])
    if category is None:
        # What runs on a GPU.
        shared_rows = forward.SharedRows.of(batch, config)
        again, _ = forward.hidden_states(module, batch, features, jnp.asarray(groups), shared_rows)
        real = one.order >= 0
        scale = np.abs(hidden[0][real]).max()
        np.testing.assert_allclose(again[0][real], hidden[0][real], atol=1e-5 * scale)

    profile = Profile(family="qwen2_5_vl", categories=categories)
    for question, expected in zip(questions, logits, strict=True):
        family = FAMILIES["qwen2_5_vl"]
        processor = Processor(config, family, tokenizer, make_image_processor())
        prompt = processor.prompt(conversation(scene, question))
        architecture = Architecture(family, config, np.float32)
        inputs = prepare_inputs(architecture, prompt, profile, backend="xla")
        alone = logits_of(programs, inputs)[-1]
        np.testing.assert_allclose(alone, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_a_run_that_was_stopped_continues_to_the_same_result(
    module, encoder, tmp_path, monkeypatch
):
    """Of the second stage, with all its parameters, but a loss that compiles in less time.

    The first stage is resumed by the same code.
    """

    def loss(module, readers, batch, plans, groups, shared_rows):
        of_batch = jnp.mean(batch.token_ids) / 1000
        leaves = jax.tree.leaves((nnx.state(module), readers))
        value = sum(jnp.mean((leaf - of_batch) ** 2) for leaf in leaves)
        return value, (batch.tasks % 2 == 0, {})

    monkeypatch.setattr(training, "loss_and_correct", loss)
    monkeypatch.setattr(training, "PHASES", (training.Phase(1.0, (2,)),))
    monkeypatch.setattr(training, "IMAGES_PER_BATCH", 2)
    settings = training.Settings(steps=3, warmup_steps=1)
    # All runs use one stage, reset to its initial state, because its step takes long to compile.
    stage = training.ModelStage(module, settings, encoder)
    monkeypatch.setattr(stage, "evaluate", lambda: {})
    first = jax.tree.map(np.array, stage.state)

    def run(folder, **options):
        stage.state = jax.tree.map(jnp.array, first)
        training.run_stage(stage, folder, log_every=1, save_every=1, **options)
        return stage.state.parameters

    run(tmp_path / "stopped", stop_after=2)
    resumed, whole = run(tmp_path / "stopped"), run(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("stopped", "whole")
    ]
    assert [line["step"] for line in logs[0]] == [1, 2, 3]
    assert [line["training"] for line in logs[0]] == [line["training"] for line in logs[1]]


def test_a_folder_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run" / "settings.json"
    training.check_settings(file, training.Settings())
    training.check_settings(file, training.Settings())
    with pytest.raises(SystemExit, match="other settings"):
        training.check_settings(file, training.Settings(seed=1))


@pytest.mark.parametrize("torn", ["", "{", '{"steps": 1', "[" * 5000, "null"])
def test_torn_settings_are_written_again(tmp_path, capsys, torn):
    file = tmp_path / "settings.json"
    training.check_settings(file, training.Settings())
    whole = file.read_text()
    file.write_text(torn)
    if torn == "null":  # Not torn, but not these settings either.
        with pytest.raises(SystemExit, match="other settings"):
            training.check_settings(file, training.Settings())
        return
    training.check_settings(file, training.Settings())
    assert "torn" in capsys.readouterr().out and file.read_text() == whole


def test_torn_lines_of_a_log_are_left_out(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "seco\n\xff\n3\n{}\n{"step": 5}\n{"step": 6, "tr')
    with file.open("a") as log:
        log.write('\n{"step": "7"}\n{"step": Infinity}\n{"step": 8.5}')
    assert training.read_log(file) == [{"step": 1}, {"step": 5}]
    said = capsys.readouterr().out
    assert [f"line {number} of" in said for number in range(1, 11)] == [
        False, True, True, True, True, False, True, True, True, True
    ]  # fmt: skip


def test_sparse_layers_see_their_own_image_and_sinks(config):
    """A test above checks that rows with such key groups see what they see in inference."""
    groups = forward.groups_of_layers(config, (1, 3))
    sparse = int(HeadCategory.INTRA_IMAGE_SINK.groups)
    assert groups.shape == (5, 1)
    assert [bool(group == sparse) for group in groups[:, 0]] == [False, True, False, True, False]
    assert all(int(group) & sparse == sparse for group in groups[:, 0])
    for missing in (-1, 5):
        with pytest.raises(ValueError, match=f"Layer {missing} does not exist.* 0 to 4"):
            forward.groups_of_layers(config, (0, missing))


@pytest.mark.slow
def test_a_run_with_sparse_layers_trains_with_them(module, config, encoder, monkeypatch):
    """Its loss uses the key groups of its categories, both in training and in evaluation.

    A test above checks that such key groups see what they see in inference.
    """
    used = []

    def of_groups(module, readers, batch, plans, groups, shared_rows):
        used.append(np.asarray(groups))
        value = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(readers)) * groups.sum()
        return value, (jnp.ones(batch.tasks.shape, bool), {})

    monkeypatch.setattr(training, "loss_and_correct", of_groups)
    settings = training.Settings(steps=1, warmup_steps=1, sparse_layers=(1, 3))
    stage = training.ModelStage(module, settings, encoder)
    stage.step(0)
    stage.evaluate()
    categories = np.zeros((5, 1), np.int8)
    categories[[1, 3]] = HeadCategory.INTRA_IMAGE_SINK
    expected = np.vectorize(lambda value: HeadCategory(value).groups.value)(categories)
    assert len(used) == 2, "traced to train, and to evaluate"
    for groups in used:
        np.testing.assert_array_equal(groups, expected)


def test_images_of_sparse_layers_are_not_taught_to_look_at_others(config, encoder):
    batch = encoder.batch(np.random.default_rng(7), 1, 3, 2)

    def taught(sparse_layers):
        groups = forward.groups_of_layers(config, sparse_layers)
        return {pointing.name for pointing in loss.pointings_of(batch, groups)}

    of_images = {"content looks", "colour looks"}
    assert taught(()) == taught((0, 2)) > of_images
    assert taught((1,)) == taught(()) - of_images


@pytest.mark.slow
def test_heads_are_taught_to_look_at_what_questions_are_about(config, encoder, tokenizer):
    """The targets of every question, expressed as images, letters and the prompt's first row."""
    random = np.random.default_rng(9)
    scene = dataclasses.replace(draw_scene(random, 5, test=False), first_label=3)
    contents, colours = scene.contents, scene.colours
    questions = [ask(random, scene, task) for task in TASKS for _ in range(5)]
    one = encoder.encode(scene, questions, 288 + 16 * len(questions))
    assert one is not None
    places = {0: "first"}
    for row, token in enumerate(one.token_ids):
        word = tokenizer.decode([token])
        if one.order[row] >= 0 and word[1:] in scene.labels:
            places[row] = word[1:] if row < 288 else f"asked {word[1:]}"
    for number, row in enumerate(one.last_rows):
        places[int(row)] = number
    groups = forward.groups_of_layers(config, ())
    batch = jax.tree.map(lambda part: part[None], one)
    looks = {
        pointing.name: [
            {places.get(int(row), int(row)) for row in np.flatnonzero(each)} for each in targets
        ]
        for pointing in loss.pointings_of(batch, groups)
        for targets in [np.asarray(pointing.targets[0])]
    }
    text = config.text_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    nothing = jnp.zeros((5, *batch.token_ids.shape, kv_heads, text.hidden_size // heads))
    readings = loss.readings_of(loss.new_readers(config, 0), nothing, batch, heads)

    def told(name):
        """The true value of a reading where it is asked for; -1 elsewhere."""
        _, truth, is_read = readings[name]
        return np.where(is_read, truth, -1)[0]

    for index, question in enumerate(questions):
        words = question.text.strip("?").split()
        of_colour = any(word in COLOURS or word in ("colour", "coloured") for word in words)
        values = colours if of_colour else contents
        if words[-1] in scene.labels:
            meant = [scene.labels.index(words[-1])]
        elif words[-1] == "twice":
            again = {value for i, value in enumerate(values) if value in values[:i]}
            meant = [i for i, value in enumerate(values) if value in again]
        else:
            meant = [i for i, value in enumerate(values) if value == words[-1]]
        letters = {scene.labels[image] for image in meant}
        repeat = words[-1] == "twice"
        by_letter = words[-1] in scene.labels
        assert looks["word looks"][index] == (letters if by_letter else set())
        by_feature = not by_letter and not repeat
        assert looks["finds"][index] == ((letters or {"first"}) if by_feature else set())
        assert looks["counts"][index] == ((letters | {"first"}) if by_feature else set())
        word = int(one.word_rows[index])
        assert looks["answer looks"][index] == {places.get(word, word)}
        last = meant[-1] if meant else "first"
        assert looks["repeat looks"][index] == ({last} if repeat else set())
        for name, feature in (("content", contents), ("colour", colours)):
            expected = set()
            if words[0] == "Is":
                one_image, other = (scene.labels.index(words[place]) for place in (2, -1))
                alike = feature[one_image] == feature[other]
                expected = {f"asked {words[2]}" if alike else "first"}
                assert looks["compared looks"][index] == {words[2]}
            assert looks[f"{name} compares"][index] == expected
        # The other readings.
        feature = int(of_colour)
        assert told("question known")[index] == 2 * list(TASKS).index(question.task) + feature
        if words[0] == "Is":
            assert told(f"{question.feature} compared")[index] == (question.answer == "yes")
        if words[0] == "How":
            assert told("number counted")[index] == int(question.answer)
        if question.task == "find" and meant:
            assert told("letter found")[index] == LABELS.index(question.answer.strip())
        if by_letter:
            assert told("content asked")[index] == CONTENTS.index(contents[meant[0]])
            assert told("colour asked")[index] == list(COLOURS).index(colours[meant[0]])
    assert told("letter known").tolist() == [LABELS.index(label) for label in scene.labels]
    for name, feature in (("content", contents), ("colour", colours)):
        for number, look in enumerate(looks[f"{name} looks"]):
            earlier = {i for i in range(number) if feature[i] == feature[number]}
            assert look == earlier | {"first"}


def test_a_run_starts_with_layers_that_add_nothing(module, config):
    """Logits are those of the embeddings alone, on the same scale as without the quiet start."""
    graph, parameters = nnx.split(module)
    quiet = nnx.merge(graph, training.quiet_start(parameters, config.text_config.hidden_size))
    ids, position_ids = jnp.arange(12), jnp.tile(jnp.arange(12), (3, 1))
    embeddings = quiet.language_model.embed(ids)
    hidden, _ = quiet.language_model.run_layers(
        embeddings, position_ids, (lambda q, k, v, scanned: (q, None),), jnp.zeros((5, 1))
    )
    normed = module.language_model.norm(module.language_model.embed(ids))
    np.testing.assert_allclose(quiet.logits(hidden), module.logits(normed), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parity
def test_the_exported_checkpoint_is_what_transformers_reads(module, config, encoder, tmp_path):
    import torch
    import transformers

    folder = tmp_path / "exported"
    export(nnx.state(module), config, folder)
    reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    exported = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(module)
    )
    rounded = nnx.merge(nnx.graphdef(module), exported)
    random = np.random.default_rng(4)
    scene = draw_scene(random, 3, test=False)
    question = ask(random, scene)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    family = FAMILIES["qwen2_5_vl"]
    processor = Processor(config, family, tokenizer, make_image_processor())
    prompt = processor.prompt(conversation(scene, question))
    with torch.no_grad():
        expected = (
            reference(
                input_ids=torch.tensor(prompt.token_ids[None].astype(np.int64)),
                pixel_values=torch.tensor(pixel_values_of(prompt.pixels, frames=2)),
                image_grid_thw=torch.tensor(prompt.grid_thw.astype(np.int64)),
                mm_token_type_ids=torch.tensor(
                    (prompt.token_ids == config.image_token_id)[None].astype(np.int64)
                ),
            )
            .logits[0]
            .numpy()
        )
    architecture = Architecture(family, config, np.float32)
    inputs = prepare_inputs(architecture, prompt, None, backend="xla")
    ours = logits_of(Programs(rounded), inputs)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
