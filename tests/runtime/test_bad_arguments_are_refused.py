"""`generate`, `forward` and `stream` refuse bad arguments of any kind with a one-line error."""

import copy
import dataclasses
import inspect
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import (
    BackendError,
    CapacityError,
    CheckpointError,
    GenerationError,
    MessageError,
    ProfileError,
    profiling,
)
from bsjax.checks import shown
from bsjax.profiling.settings import Divergence, Reduction, Settings, Threshold
from bsjax.runtime.programs import Programs
from convert.conversion import convert_checkpoint
from tests.support.convert_sources import edit_json
from tests.support.fuzzing import check_message
from tests.support.refusals import HUGE, refused

MESSAGES = [{"role": "user", "content": "hello"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "hi"}]

pytestmark = pytest.mark.usefixtures("annotations_unchecked")


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Makes compiling anything fail the test."""

    def get(*_, **__):
        raise AssertionError("a program was compiled or run")

    monkeypatch.setattr(Programs, "get", get)


TAKE_A_MODEL = {
    "generate": (lambda model: bsjax.generate(model, MESSAGES), GenerationError),
    "forward": (lambda model: bsjax.forward(model, MESSAGES), GenerationError),
    "stream": (lambda model: bsjax.stream(model, MESSAGES), GenerationError),
    "generate_iter": (lambda model: bsjax.generate_iter(model, [MESSAGES]), GenerationError),
    "score": (lambda model: bsjax.score(model, ANSWERED), GenerationError),
    "warmup": (bsjax.warmup, GenerationError),
    "Session": (bsjax.Session, GenerationError),
    "Session.load": (lambda model: bsjax.Session.load("a.session", model), GenerationError),
    "Profile.resolve": (lambda model: bsjax.Profile.resolve("a.json", model), ProfileError),
    "Profile.resolve dense": (lambda model: bsjax.Profile.resolve(None, model), ProfileError),
    "Profile.uniform": (lambda model: bsjax.Profile.uniform("SINK", model), ProfileError),
    "profile": (lambda model: bsjax.profile(model, [MESSAGES]), ProfileError),
    "measure": (lambda model: profiling.measure(model, [MESSAGES]), ProfileError),
    "Evaluator": (lambda model: profiling.Evaluator(model, [MESSAGES]), ProfileError),
    "refine": (
        lambda model: profiling.refine(
            model, SimpleNamespace(sinks=None), [MESSAGES], target_reduction=0.1
        ),
        ProfileError,
    ),
}
"""Every public function that takes a model."""


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_models_that_are_not_loaded(name, tiny_model):
    call, error = TAKE_A_MODEL[name]
    words = "model must be what bsjax.load returns"
    for model in ("some/model", Path("some/model"), 3, bsjax, bsjax.LoadedModel, tiny_model.module):
        refused(lambda model=model: call(model), error, words)
    refused(lambda: call("some/model"), error, "Load it first: bsjax.load('some/model')")
    # These two can do without a model.
    without = {"Profile.uniform": "needs a model, or family", "refine": "needs a model or an Eval"}
    refused(lambda: call(None), error, without.get(name, words))


def test_every_public_function_that_takes_a_model_is_tested():
    public = {name: getattr(bsjax, name) for name in bsjax.__all__}
    public |= {name: getattr(profiling, name) for name in profiling.__all__}
    public |= {
        f"{name}.{method}": getattr(member, method)
        for name, member in list(public.items())
        for method in ("load", "resolve", "uniform")
        if hasattr(member, method)
    }
    takes = [
        name
        for name, member in public.items()
        if callable(member) and "model" in inspect.signature(member).parameters
    ]
    assert set(takes) <= set(TAKE_A_MODEL)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        *(
            ({"temperature": value}, GenerationError, "temperature must be a number")
            for value in ("x", -1, float("nan"), 1e39, 10**400, True, [1], 1j, HUGE)
        ),
        *(
            ({"top_k": value}, GenerationError, "top_k must be")
            for value in (0, -1, "x", 1.5, [2], np.array([2, 3]))
        ),
        *(
            ({"top_p": value}, GenerationError, "top_p must be")
            for value in (0, -1, 2, "x", float("nan"), True, [0.5], 10**400)
        ),
        *(
            ({"seed": value}, GenerationError, "seed must be")
            for value in (None, -1, 2**32, "x", 1.5, HUGE, True)
        ),
        *(
            ({"max_new_tokens": value}, GenerationError, "max_new_tokens must be")
            for value in (0, -1, "x", 1.5, True)
        ),
        *(
            ({"max_new_tokens": value}, CapacityError, "Lower max_new_tokens to")
            for value in (10**6, 10**30, HUGE)
        ),
        *(({"stream": value}, GenerationError, "stream must be") for value in (3, "x", [1])),
        *(
            ({"backend": value}, BackendError, "Unknown attention backend")
            for value in (None, 3, ["xla"], "cuda")
        ),
        *(
            ({"profile": value}, ProfileError, "A profile must be")
            for value in (3, [1], b"x", {}, 3j)
        ),
        *(
            ({"profile": value}, ProfileError, "no shipped profile")
            for value in ("", "nope", "\0", "x" * 100_000)
        ),
    ],
    ids=lambda value: shown(value)[:60],
)
@pytest.mark.usefixtures("nothing_compiled")
def test_arguments_of_generate(tiny_model, arguments, error, words):
    refused(lambda: bsjax.generate(tiny_model, MESSAGES, **arguments), error, words)
    if "stream" not in arguments:
        # Before the first piece is asked for.
        refused(lambda: bsjax.stream(tiny_model, MESSAGES, **arguments), error, words)


@pytest.mark.parametrize(
    "arguments",
    [
        {"top_k": 10**12},
        {"top_k": HUGE},
        {"top_k": np.int64(3)},
        {"top_p": 1e-50},
        {"temperature": np.float32(0.5)},
        {"temperature": jnp.float32(0.5)},
        {"seed": np.uint8(3)},
    ],
    ids=shown,
)
def test_unusual_arguments_that_are_valid(tiny_model, arguments):
    drawn = {"temperature": 0.7, "max_new_tokens": 2}
    assert bsjax.generate(tiny_model, MESSAGES, **(drawn | arguments)).token_ids


def test_more_than_all_tokens_are_all_tokens(tiny_model):
    settings = {"temperature": 1.5, "seed": 7, "max_new_tokens": 4}
    results = [
        bsjax.generate(tiny_model, MESSAGES, top_k=top_k, **settings).token_ids
        for top_k in (None, 10**12)
    ]
    assert results[0] == results[1]


CYCLE = []
CYCLE.append(CYCLE)
CYCLIC_CONTENT = {"role": "user"}
CYCLIC_CONTENT["content"] = [CYCLIC_CONTENT]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "Messages must be a list"),
        (3, "Messages must be a list"),
        ("hello", "Messages must be a list"),
        (b"hello", "Messages must be a list"),
        ({}, "Messages must be a list"),
        (iter(MESSAGES), "Messages must be a list"),
        (np.array([1]), "Messages must be a list"),
        ([], "The list of messages is empty"),
        ([[]], "conversations[0]: The list of messages is empty"),
        ([MESSAGES, []], "conversations[1]: The list of messages is empty"),
        ([MESSAGES, MESSAGES, 3], "conversations[2]: Messages must be a list"),
        ([MESSAGES, None], "conversations[1]: Messages must be a list"),
        ([MESSAGES, [3]], "conversations[1]: messages[0]"),
        ([[MESSAGES]], "conversations[0]: messages[0]"),
        (CYCLE, "conversations[0]: messages[0]"),
        ([MESSAGES, CYCLE], "conversations[1]: messages[0]"),
        ([CYCLIC_CONTENT], "messages[0]['content'][0]"),
    ],
)
@pytest.mark.usefixtures("nothing_compiled")
def test_batches(tiny_model, messages, words):
    refused(lambda: bsjax.generate(tiny_model, messages, max_new_tokens=1), MessageError, words)
    refused(lambda: bsjax.forward(tiny_model, messages), MessageError, words)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("content", [b"not an image", None])
def test_all_conversations_are_checked_before_the_first_one_runs(tiny_model, tmp_path, content):
    image = tmp_path / "image.png"
    if content is not None:
        image.write_bytes(content)
    messages = [{"role": "user", "content": [{"type": "image", "image": str(image)}]}]
    words = "conversations[1]: Image 1 of 1 (messages[0]['content'][0]"
    for call in (bsjax.generate, bsjax.forward):
        refused(lambda call=call: call(tiny_model, [MESSAGES, messages]), MessageError, words)
    answer = ANSWERED[-1]
    refused(lambda: bsjax.score(tiny_model, [ANSWERED, [*messages, answer]]), MessageError, words)


ASKED_AGAIN = [*ANSWERED, *MESSAGES]


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("call", "batch", "words"),
    [
        (bsjax.score, [ANSWERED, MESSAGES], "conversations[1]: messages[0], the last message, has"),
        (bsjax.score, [ANSWERED, ANSWERED[1:]], "conversations[1]: messages[0] is an answer to"),
        *(
            (
                partial(call, continue_final_message=True),
                [ANSWERED, ASKED_AGAIN],
                "conversations[1]: messages[2], the last message, has the role 'user'",
            )
            for call in (bsjax.generate, bsjax.forward)
        ),
    ],
)
def test_all_conversations_have_the_form_that_the_call_needs(tiny_model, call, batch, words):
    refused(lambda: call(tiny_model, batch), MessageError, words)


def test_the_images_of_a_batch_fit_its_options(tiny_model, nothing_compiled):
    """Scaled by `max_pixels` of the call, the image is small enough; without, it is not."""
    sources = bsjax.ImageSources(max_scaled_pixels=28 * 28 * 4)
    model = dataclasses.replace(tiny_model, image_sources=sources)
    picture = {"type": "image", "image": np.zeros((280, 280, 3), np.uint8)}
    batch = [MESSAGES, [{"role": "user", "content": [picture]}]]
    words = "conversations[1]: Image 1 of 1 (messages[0]['content'][0]): it would be scaled to"
    refused(lambda: bsjax.generate(model, batch), MessageError, words)
    with pytest.raises(AssertionError, match="a program was compiled or run"):
        bsjax.generate(model, batch, max_pixels=28 * 28 * 4)


@pytest.mark.usefixtures("nothing_compiled")
def test_streams_read_their_messages_at_once(tiny_model):
    missing = [{"role": "user", "content": [{"type": "image", "image": "missing.png"}]}]
    session = bsjax.Session(tiny_model)
    for stream in (partial(bsjax.stream, tiny_model), session.stream):
        refused(lambda stream=stream: stream(missing), MessageError, "there is no such file")
        refused(lambda stream=stream: stream([3]), MessageError, "messages[0]")
        refused(
            lambda stream=stream: stream(MESSAGES, max_new_tokens=10**6),
            CapacityError,
            "Lower max_new_tokens to",
        )


WORDS = {"type": "text", "text": "word " * 200}
PICTURES = [{"type": "image", "image": np.zeros((140, 140, 3), np.uint8)}] * 4


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ([WORDS], "Shorten the text of the messages"),
        (PICTURES, "Lower max_pixels or pass fewer images"),
        ([*PICTURES, WORDS], "Shorten the text of the messages, lower max_pixels"),
    ],
    ids=["text", "images", "both"],
)
@pytest.mark.usefixtures("nothing_compiled")
def test_a_prompt_that_is_too_long_names_the_lever_that_applies(tiny_model, content, advice):
    config = copy.deepcopy(tiny_model.config)
    config.get_text_config().max_position_embeddings = 16
    model = dataclasses.replace(tiny_model, config=config)
    messages = [{"role": "user", "content": content}]
    with pytest.raises(CapacityError) as caught:
        bsjax.forward(model, messages)
    said = str(caught.value)
    assert advice in said and "new tokens" not in said and "max_new_tokens" not in said
    assert ("max_pixels" in said) == (PICTURES[0] in content)
    assert ("the text" in said) == (WORDS in content)
    # Fewer new tokens would not make it fit.
    with pytest.raises(CapacityError) as caught:
        bsjax.generate(model, messages, max_new_tokens=2)
    assert advice in str(caught.value) and "max_new_tokens" not in str(caught.value)


def test_tokens_that_the_model_does_not_know_are_refused(tiny_model):
    config = copy.deepcopy(tiny_model.config)
    config.get_text_config().vocab_size = 20
    model = dataclasses.replace(tiny_model, config=config)
    with pytest.raises(MessageError, match=r"makes the token \d+ .* up to 19"):
        bsjax.forward(model, MESSAGES)


def test_a_prompt_that_is_too_long_is_named_in_a_batch(tiny_model):
    batch = [MESSAGES, [{"role": "user", "content": "word " * 20_000}]]
    with pytest.raises(CapacityError, match=r"^conversations\[1\]: The prompt needs"):
        bsjax.generate(tiny_model, batch, max_new_tokens=1)


@pytest.mark.parametrize("token", [10**30, HUGE, -1, "x", 1.5, [1, None], [[1]]], ids=shown)
def test_end_of_sequence_tokens(tiny_model, token):
    config = type(tiny_model.generation_config)()
    config.eos_token_id = token
    model = dataclasses.replace(tiny_model, generation_config=config)
    refused(lambda: bsjax.generate(model, MESSAGES), GenerationError, "eos_token_id must be")


def test_end_of_sequence_tokens_in_a_file(tiny_source, tmp_path):
    folder = tmp_path / "converted"
    convert_checkpoint(tiny_source, folder)
    edit_json(folder / "generation_config.json", eos_token_id=10**30)
    refused(lambda: bsjax.load(folder), CheckpointError, "eos_token_id must be a token id")


@pytest.mark.parametrize("path", [None, 3, [1], b"x", "~nobody-of-this-name/x"])
def test_paths_that_are_not_valid(path):
    refused(lambda: bsjax.load(path), CheckpointError, "is not the path of a folder")


@pytest.mark.parametrize("path, hint", [("Qwen/Qwen2-VL-2B", True), ("/nowhere/to/be", False)])
def test_only_what_can_be_a_name_on_the_hub_is_taken_for_one(path, hint):
    with pytest.raises(CheckpointError, match="there is no folder") as caught:
        bsjax.load(path)
    assert ("hub id" in str(caught.value)) == hint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("max_programs", value) for value in (0, -1, None, "x", 1.5, True)),
        *(("verify", value) for value in (None, 0, "no", np.zeros(2), HUGE)),
        *(("dtype", value) for value in ("int8", [1], HUGE)),
    ],
    ids=lambda value: shown(value)[:60],
)
def test_options_of_load(tiny_checkpoint, option, value):
    refused(lambda: bsjax.load(tiny_checkpoint, **{option: value}), CheckpointError, option)


def test_text_is_not_taken_for_true_when_profiling():
    refused(lambda: Settings(refine="no"), ProfileError, "refine must be True or False")


@pytest.mark.parametrize(
    "call",
    [
        lambda: bsjax.Profile.uniform(HUGE),
        lambda: bsjax.Profile.uniform("SINK", family=HUGE),
        lambda: bsjax.Profile(HUGE, np.zeros((1, 1), np.int8)),
        lambda: bsjax.read_samples(HUGE),
        lambda: bsjax.read_samples(".", seed=HUGE),
        lambda: bsjax.read_samples(".", limit=10**9),
        lambda: bsjax.read_samples("x", images_per_prompt=HUGE),
        lambda: bsjax.ImageSources(max_seconds=HUGE),
        lambda: bsjax.ImageSources(max_seconds=1e300),
        lambda: bsjax.ImageSources(max_bytes=True),
        *(
            lambda name=name: Settings(**{name: HUGE})
            for name in ("criterion", "quantile", "held_out", "answer_tokens", "seed")
        ),
        lambda: Threshold(HUGE),
        lambda: Reduction(HUGE),
        lambda: Divergence(HUGE),
    ],
)
def test_values_that_cannot_be_written_out(call):
    with pytest.raises(bsjax.BsjaxError) as caught:
        call()
    check_message(caught.value)
