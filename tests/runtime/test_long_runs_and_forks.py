"""Long-running processes keep few programs; processes forked after loading refuse to compute."""

import os
import select
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
from bsjax import BackendError, BlockMask, CheckpointError, GenerationError, ProfileError, checks
from bsjax.profiling.prompt_inputs import embed
from bsjax.runtime.programs import Programs, programs_of
from convert.conversion import convert_checkpoint

MESSAGES = [{"role": "user", "content": "hello"}]


def double(module, values):
    return 2 * module(values)


def small_programs(**options):
    return Programs(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), **options)


def rows(count):
    return (np.ones((count, 2), np.float32),)


def test_the_programs_that_were_used_last_are_kept():
    programs = small_programs(max_programs=3)

    def compiles(count):
        before = programs.compilations
        result = programs.get(double, rows(count))(*rows(count))
        assert result.shape == (count, 2) and len(programs) <= 3
        return programs.compilations - before

    assert [compiles(count) for count in (1, 2, 3)] == [1, 1, 1]
    assert [compiles(count) for count in (1, 2, 3)] == [0, 0, 0]
    assert compiles(1) == 0, "is now the one used last"
    assert compiles(4) == 1, "in the place of 2"
    assert [compiles(count) for count in (1, 3, 4)] == [0, 0, 0]
    assert compiles(2) == 1
    assert programs.of_this_thread[0] > 0


def test_what_is_dropped_is_freed():
    programs = small_programs(max_programs=2)
    client = jax.devices()[0].client
    before = len(client.live_executables())
    for count in range(1, 30):
        programs.get(double, rows(count))
    assert len(client.live_executables()) <= before + 2


def test_a_program_in_use_outlives_its_place():
    programs = small_programs(max_programs=1)
    first = programs.get(double, rows(1))
    programs.get(double, rows(2))
    assert len(programs) == 1 and first(*rows(1)).shape == (1, 2)


def test_threads_share_programs_within_the_bound():
    programs = small_programs(max_programs=2)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda n: programs.get(double, rows(n))(*rows(n)), [1, 2, 3] * 16)
        assert [result.shape[0] for result in results] == [1, 2, 3] * 16
    assert len(programs) == 2


def test_a_model_has_the_bound_that_it_was_loaded_with(tiny_checkpoint, tiny_model):
    programs = programs_of(bsjax.load(tiny_checkpoint, max_programs=2))
    for count in (1, 2, 3):
        programs.get(embed, (np.zeros(count, np.int32),))
    assert len(programs) == 2 and programs.compilations == 3
    assert tiny_model.max_programs == 64


def in_a_forked_child(function):
    """What `function` raises in a forked child, as text; fails if that takes more than 10 s."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # JAX itself warns of every fork.
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        try:
            function()
            said = "nothing raised"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    try:
        answered = bool(select.select([read], [], [], 10)[0])
        if not answered:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert answered, "the child hangs"
        return os.read(read, 10_000).decode()
    finally:
        os.close(read)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda model: bsjax.generate(model, MESSAGES), GenerationError),
        (lambda model: bsjax.forward(model, MESSAGES), GenerationError),
        (lambda model: bsjax.profile(model, [MESSAGES]), ProfileError),
        (lambda model: bsjax.load(model.path), CheckpointError),
        (lambda model: convert_checkpoint(model.path, "unused"), CheckpointError),
        (lambda model: attend(), BackendError),
    ],
    ids=["generate", "forward", "profile", "load", "convert", "sparse_attention"],
)
def test_a_process_that_was_forked_after_loading_refuses_to_compute(tiny_model, call, error):
    said = in_a_forked_child(lambda: call(tiny_model))
    assert said.startswith(f"{error.__name__}: This process was forked from process {os.getpid()} ")
    assert "multiprocessing.get_context('spawn')" in said and "\n" not in said


QUERIES = jnp.ones((4, 1, 16))


def attend():
    template = bsjax.Template.from_segments([bsjax.Text(4)])
    q = QUERIES
    return bsjax.sparse_attention(q, q, q, BlockMask(template, ["DENSE"]))


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_does_not_go_on_in_a_forked_child(tiny_model, begun):
    pieces = bsjax.stream(tiny_model, MESSAGES, max_new_tokens=32)
    if begun:
        next(pieces)
    said = in_a_forked_child(lambda: list(pieces))
    assert said.startswith("GenerationError: This process was forked from")


def test_a_process_that_was_forked_after_jax_was_used_without_bsjax_is_told(monkeypatch):
    monkeypatch.setattr(checks, "jax_in_use", False)
    assert in_a_forked_child(attend).startswith("BackendError: This process was forked from")


def test_masks_and_prompts_can_be_made_in_a_forked_child(tiny_model):
    def make():
        bsjax.Template.from_segments([bsjax.Text(4)])
        raise SystemExit(tiny_model.prompt(MESSAGES).token_ids.size)

    assert in_a_forked_child(make) == f"SystemExit: {tiny_model.prompt(MESSAGES).token_ids.size}"
