"""A handful of programs serves all prompts, and `warmup` compiles them before the first one."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsjax
from bsjax import CapacityError, GenerationError, Profile
from bsjax.cli import main
from bsjax.prompts.prompt import Prompt, PromptImage
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.programs import Programs, programs_of
from bsjax.runtime.sampling import GREEDY, Sampling
from bsjax.runtime.sizes import cache_rows
from bsjax.runtime.warmup import cache_lengths
from tests.support.chunks import decoding_of, prefill_of

MOST_PROGRAMS = 12


def shapes_only(jitted, shapes):
    """Takes the place of compiling: the number of programs is known without it."""
    return SimpleNamespace(out_info=jitted.eval_shape(*shapes), memory_analysis=lambda: None)


def random_prompt(model, generator) -> Prompt:
    """50 to 8,000 tokens, 0 to 30 images of any size, and text between some of them."""
    config = model.config
    length = int(generator.integers(50, 8000))
    grids, pieces, used = [], [], 0
    for _ in range(generator.integers(0, 31)):
        rows, columns = generator.integers(1, 24, 2)
        text = int(generator.integers(0, 30))
        if used + text + rows * columns > length:
            break
        used += text + int(rows * columns)
        pieces += [0] * text + [config.image_token_id] * int(rows * columns)
        grids.append((1, rows, columns))
    return prompt_of(model, pieces + [0] * (length - used), grids)


def prompt_of(model, token_ids, merged_grids) -> Prompt:
    """A prompt with blank images. Their grids are counted in image tokens."""
    merge = model.config.vision_config.spatial_merge_size
    grids = np.asarray(merged_grids, np.int32).reshape(-1, 3) * np.int32([1, merge, merge])
    blank = np.zeros((0, 0), np.uint8)
    images = [
        PromptImage(grid, int(grid.prod()) // merge**2, model.pixel_scale, lambda: blank)
        for grid in grids
    ]
    return Prompt(np.asarray(token_ids, np.int32), tuple(images))


@pytest.mark.slow
def test_a_hundred_unlike_prompts_need_twelve_programs(tiny_model):
    programs = Programs(tiny_model.module, shapes_only)
    generator = np.random.default_rng(0)
    sparse = Profile.uniform("INTRA_IMAGE_SINK", tiny_model)
    drawn = Sampling.checked(0.7, 20, 0.9, 3)
    chunks = 0
    for number in range(100):
        profile, sampling = (None, sparse)[number % 2], (GREEDY, drawn)[number // 2 % 2]
        inputs = prepare_inputs(
            tiny_model.architecture,
            random_prompt(tiny_model, generator),
            profile,
            backend="xla",
            new_tokens=64,
        )
        prefill = prefill_of(programs, inputs, new_tokens=64, sampling=sampling)
        for chunk in prefill.chunks:
            prefill.program_of(chunk)
            chunks += 1
        decoding_of(programs, prefill)
    assert chunks > 500
    assert programs.compilations <= MOST_PROGRAMS


def test_large_images_need_no_chunks_of_their_own(tiny_model):
    programs = Programs(tiny_model.module, shapes_only)
    image_token = tiny_model.config.image_token_id
    own = []
    for rows, columns in ((20, 30), (39, 69), (80, 95), (1, 7000)):
        of_image = [image_token] * (rows * columns)
        text = [0] * (8000 - len(of_image))
        prompt = prompt_of(tiny_model, of_image + text, [(1, rows, columns)])
        inputs = prepare_inputs(tiny_model.architecture, prompt, None, backend="xla", new_tokens=9)
        prefill = prefill_of(programs, inputs, new_tokens=9)
        own.append({id(stage.program) for stage in prefill.stages if stage.name == "prefill"})
    assert own[1:] == own[:-1]


@pytest.mark.slow
def test_after_warmup_no_prompt_compiles(tiny_checkpoint):
    model = bsjax.load(tiny_checkpoint)
    done = bsjax.warmup(model, max_tokens=2000)
    assert done.programs == programs_of(model).compilations and done.seconds > 0
    picture = np.full((84, 112, 3), 99, np.uint8)
    for images in (0, 1, 7):
        parts = [{"type": "image", "image": picture}] * images
        text = {"type": "text", "text": "What is this? " * 5 * (images + 1)}
        messages = [{"role": "user", "content": [*parts, text]}]
        options = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.2}
        stats = bsjax.generate(
            model, messages, max_new_tokens=3, log_probabilities=2, **options
        ).stats
        assert (stats.compiled_programs, stats.compile_seconds) == (0, 0.0)
        answers = [{"role": "assistant", "content": text} for text in ("This.", "I do not know. ")]
        bsjax.score(model, [*messages, answers[0]])
        bsjax.score(model, [[*messages, answer] for answer in answers])
    assert programs_of(model).compilations == done.programs
    assert bsjax.warmup(model, max_tokens=2000).programs == 0
    assert bsjax.warmup(model, max_tokens=2000, conversations=4).programs > 0
    question = [{"role": "user", "content": "What is this? " * 80}]
    for result in bsjax.generate(model, [question] * 3, max_new_tokens=3):
        assert (result.stats.compiled_programs, result.stats.compile_seconds) == (0, 0.0)
    sparse = Profile.uniform("sink", model)
    before = programs_of(model).compilations
    done = bsjax.warmup(model, max_tokens=2000, profile=sparse, scoring=False)
    more = bsjax.warmup(model, max_tokens=2000, profile=sparse)
    assert done.programs > more.programs > 0
    bsjax.score(model, [[*messages, answer] for answer in answers], profile=sparse)
    assert programs_of(model).compilations == before + done.programs + more.programs


@given(st.integers(1, 400_000), st.integers(1, 400_000))
@settings(max_examples=200)
def test_caches_have_few_lengths_and_waste_little(tokens, more):
    rows = cache_rows(tokens)
    assert tokens <= rows <= max(8192, 1.25 * tokens)
    assert cache_rows(rows) == rows and cache_rows(tokens + more) >= rows
    assert rows in cache_lengths(tokens)


def test_bad_arguments_of_warmup_are_refused(tiny_model, annotations_unchecked):
    limit = tiny_model.config.text_config.max_position_embeddings
    with pytest.raises(CapacityError, match=f"has {limit} positions. Lower it to {limit}"):
        bsjax.warmup(tiny_model, max_tokens=limit + 1)
    for arguments in ({"max_tokens": 0}, {"images": "no"}, {"conversations": 0}, {"scoring": 1}):
        with pytest.raises(GenerationError, match=next(iter(arguments))):
            bsjax.warmup(tiny_model, **arguments)
    with pytest.raises(GenerationError, match=r"bsjax\.load"):
        bsjax.warmup("checkpoint")


@pytest.mark.slow
def test_the_command_line_warms_up(tiny_checkpoint, capsys):
    arguments = ["warmup", str(tiny_checkpoint), "--max-tokens", "300", "--no-images"]
    assert main([*arguments, "--no-scoring"]) == 0
    assert "dense: 3 programs in" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "dense: 5 programs in" in capsys.readouterr().out
    assert main(["warmup", str(tiny_checkpoint), "--profile", "no-such-profile"]) == 2
    said = capsys.readouterr()
    assert "no-such-profile" in said.err and not said.out, "before anything is compiled"
    assert main(["warmup", str(tiny_checkpoint), "--max-tokens", "0"]) == 2
    assert "--max-tokens must be at least 1" in capsys.readouterr().err
