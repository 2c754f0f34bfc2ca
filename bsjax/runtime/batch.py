"""Conversations that run together: chunks with tokens of several, and one decode for all answers.

    waiting   | a sequence of the cache for each                           | answers, as they end
    d e f ... | a: prompt, answer ...   b: prompt, answer ...   c: prompt   |

Prompts of similar length share a cache, a *pool*. When an answer ends, the next prompt takes its
sequence. What several prompts begin with runs once, in a sequence of its own, from which it is
copied (`bsjax.runtime.shared_prefixes`).
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import check_not_forked, naming
from bsjax.errors import BsjaxError, CapacityError, GenerationError
from bsjax.models import ImageTextModel
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt, PromptOptions
from bsjax.runtime.answers import Answer, tokens_of
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.decoding import DECODE_CHUNK, Answers, AnswerSettings, DecodeState, Decoding
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.memory import bytes_available, check_memory
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import Program, Programs, programs_of, size_in_bytes
from bsjax.runtime.results import Result, Stats
from bsjax.runtime.reuse import NOTHING, Reuse, extended
from bsjax.runtime.shared_prefixes import common_tokens, shared_prefixes
from bsjax.runtime.sizes import cache_rows, most_sequences

# Tokens of each answer between two looks for stop texts.
_STEPS_BEFORE_STOP = 16

# Patches of the images of waiting prompts, in the host's memory.
_MOST_PIXEL_BYTES = 2**30


class Task(NamedTuple):
    """A conversation of a batch.

    Attributes:
      number: its index in the batch.
      messages: its messages.
      settings: how it is answered, once for each answer that is wanted.
      place: what errors call it; None if it is the only one.
    """

    number: int
    messages: Any
    settings: tuple[AnswerSettings, ...]
    place: str | None


class Answered(NamedTuple):
    """What became of an answer.

    Attributes:
      number: index of the conversation in the batch.
      copy: which of its answers it is.
      outcome: the answer, or why there is none.
    """

    number: int
    copy: int
    outcome: Result | BsjaxError


def copy_sequence(
    module: ImageTextModel,
    state: DecodeState,
    source: Int[Array, ""],
    target: Int[Array, ""],
) -> DecodeState:
    """Copies the cache of one sequence over that of another one. Donate `state`."""
    sequences = state.token.shape[0]
    copied = module.language_model.copied(state.cache, source, target, sequences)
    return state._replace(cache=copied)


def copying_program(programs: Programs, state: Any) -> Program:
    """The program of `copy_sequence` for a state of this shape."""
    number = jax.ShapeDtypeStruct((), np.int32)
    return programs.get(copy_sequence, (state, number, number), donate=(0,))


@dataclass(eq=False)
class _Prefix:
    """Tokens that several waiting prompts begin with.

    Attributes:
      inputs: one of the prompts.
      tokens: how many tokens they share.
      sequence: the sequence that holds them; None before they have one.
      is_ready: whether they have run.
      vision, prefill: seconds that no answer has in its statistics yet.
    """

    inputs: ModelInputs
    tokens: int
    sequence: int | None = None
    is_ready: bool = False
    vision: float = 0.0
    prefill: float = 0.0


@dataclass(eq=False)
class _Conversation:
    """A prompt that waits for a sequence, or its answer as it grows.

    Attributes:
      task: the conversation.
      copy: which of its answers it is.
      prompt: the prompt.
      inputs: the prompt as it runs.
      settings: how it is answered.
      answer: the answer so far.
      prefix: what it shares with others.
      is_compared: whether it has been compared with the others that wait.
      reused: how many tokens were copied from a prefix.
      vision, prefill, decode: seconds so far.
    """

    task: Task
    copy: int
    prompt: Prompt
    inputs: ModelInputs
    settings: AnswerSettings
    answer: Answer
    prefix: _Prefix | None = None
    is_compared: bool = False
    reused: int = 0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


_Placed = list[tuple[PlacedPrompt, _Conversation | _Prefix]]


def run_batch(
    model: LoadedModel,
    tasks: Iterable[Task],
    profile: Profile | None,
    options: PromptOptions,
    *,
    return_errors: bool,
) -> Iterator[Answered]:
    """Answers conversations together. Yields answers as they end.

    Args:
      model: from `bsjax.load`.
      tasks: the conversations; they are taken as sequences become free.
      profile: head categories of prefill.
      options: how messages become prompts.
      return_errors: whether a conversation that cannot be answered gives an error in place of an
        answer; otherwise the error is raised.

    Raises:
      BsjaxError: as for `bsjax.generate`, with the number of the conversation.
    """
    source = _Source(model, iter(tasks), profile, options, return_errors=return_errors)
    yield from source.fill()
    while source.waiting:
        # First the cache that most prompts wait for.
        rows = max(source.waiting, key=lambda rows: len(source.waiting[rows]))
        yield from _Pool(model, source, rows).run()
        yield from source.fill()


class _Source:
    """Prepares prompts, a limited number ahead, and sorts them by the cache that they need.

    Attributes:
      waiting: the prompts that are ready, by the rows of a sequence.
    """

    def __init__(
        self,
        model: LoadedModel,
        tasks: Iterator[Task],
        profile: Profile | None,
        options: PromptOptions,
        *,
        return_errors: bool,
    ) -> None:
        self.waiting: dict[int, deque[_Conversation]] = {}
        self._model, self._tasks, self._options = model, tasks, options
        self._profile = profile
        self._return_errors = return_errors

    def fill(self) -> Iterator[Answered]:
        """Prepares prompts until enough are waiting. Yields the errors of those that cannot run."""
        while self._has_room():
            task = next(self._tasks, None)
            if task is None:
                return
            try:
                with naming(task.place):
                    prepared = self._prepared(task)
            except BsjaxError as error:
                if not self._return_errors:
                    raise
                copies = range(len(task.settings))
                yield from (Answered(task.number, copy, error) for copy in copies)
                continue
            for each in prepared:
                rows = cache_rows(each.inputs.tokens + each.settings.new_tokens)
                self.waiting.setdefault(rows, deque()).append(each)

    def failed(self, conversation: _Conversation, error: BsjaxError) -> Answered:
        """The outcome of a conversation whose prompt cannot run."""
        try:
            with naming(conversation.task.place):
                raise error
        except BsjaxError as named:
            if not self._return_errors:
                raise
            return Answered(conversation.task.number, conversation.copy, named)

    def inputs_of(
        self, prompt: Prompt, new_tokens: int, backend: str, start: int = 0
    ) -> ModelInputs:
        """The prompt, of which the tokens from `start` on have to run."""
        return prepare_inputs(
            self._model.architecture,
            prompt,
            self._profile,
            backend=backend,
            new_tokens=new_tokens,
            start=start,
        )

    def _has_room(self) -> bool:
        waiting = [each for queue in self.waiting.values() for each in queue]
        pixels = {id(each.prompt): each.prompt.pixel_values for each in waiting}
        held = sum(0 if of is None else of.nbytes for of in pixels.values())
        return len(waiting) < 2 * most_sequences() and held < _MOST_PIXEL_BYTES

    def _prepared(self, task: Task) -> list[_Conversation]:
        prompt = self._model.prompt_of(task.messages, self._options)
        longest = max(settings.new_tokens for settings in task.settings)
        inputs = self.inputs_of(prompt, longest, task.settings[0].backend)
        return [
            _Conversation(
                task=task,
                copy=copy,
                prompt=prompt,
                inputs=inputs,
                settings=settings,
                answer=Answer(self._model.tokenizer, settings),
            )
            for copy, settings in enumerate(task.settings)
        ]


class _Pool:
    """A cache, and the prompts and answers that have its sequences."""

    def __init__(self, model: LoadedModel, source: _Source, rows: int) -> None:
        self._model, self._source, self._rows = model, source, rows
        self._programs = programs_of(model)
        self._compiled = self._programs.compile_seconds, self._programs.compilations
        self._running: dict[int, _Conversation] = {}
        self._prefixes: list[_Prefix] = []
        first = source.waiting[rows][0].settings
        self._backend, self._end_tokens = first.backend, first.end_tokens
        self._unused = AnswerSettings(1, first.backend, end_tokens=first.end_tokens)

    def run(self) -> Iterator[Answered]:
        """Answers all prompts that wait for this cache, and those that come meanwhile."""
        waiting = self._source.waiting[self._rows]
        yield from self._allocate(waiting)
        while waiting or self._running:
            self._find_prefixes(waiting)
            while placed := self._place(waiting):
                yield from self._run_prompts(placed)
            if self._running:
                yield from self._decode(len(waiting))
            yield from self._source.fill()
        del self._source.waiting[self._rows]

    def _allocate(self, waiting: deque[_Conversation]) -> Iterator[Answered]:
        """Chooses how many sequences there are. Refuses prompts that do not fit even alone."""
        self._available = bytes_available()
        sequences = sequences_for(self._model.module, self._rows, len(waiting), self._available)
        while True:
            layout = CacheLayout(self._rows, sequences)
            first = list(itertools.islice(waiting, sequences))
            placed = [PlacedPrompt(of.inputs, sequence=at) for at, of in enumerate(first)]
            settings = [of.settings for of in first]
            prefill = Prefill(self._programs, placed, layout, settings, self._backend)
            decoding = Decoding(self._programs, layout, self._end_tokens, self._backend)
            stages = [*prefill.stages, *decoding.stages]
            try:
                check_memory(first[0].inputs, stages, self._available)
            except CapacityError as error:
                if sequences == 1:
                    yield self._source.failed(waiting.popleft(), error)
                    if waiting:
                        continue
                    return
                sequences //= 2
            else:
                break
        self._layout, self._decoding = layout, decoding
        self._state = DecodeState.empty(self._programs.module, layout)

    def _find_prefixes(self, waiting: deque[_Conversation]) -> None:
        """Looks for what waiting prompts begin with, and forgets what none of them needs.

        Prompts that share a prefix are brought together, so that its sequence is soon free again.
        """
        for each in waiting:
            for prefix in self._prefixes:
                if each.is_compared or each.prefix is not None:
                    break
                if common_tokens(prefix.inputs, each.inputs) >= prefix.tokens:
                    each.prefix = prefix
        alone = [each for each in waiting if each.prefix is None]
        if self._layout.sequences > 1 and not all(each.is_compared for each in alone):
            for shared in shared_prefixes([each.inputs for each in alone]):
                prefix = _Prefix(alone[shared.members[0]].inputs, shared.tokens)
                self._prefixes.append(prefix)
                for index in shared.members:
                    alone[index].prefix = prefix
        for each in waiting:
            each.is_compared = True
        first = {}
        for at, each in enumerate(waiting):
            first.setdefault(id(each.prefix or each), at)
        ordered = sorted(waiting, key=lambda each: first[id(each.prefix or each)])
        waiting.clear()
        waiting.extend(ordered)
        self._prefixes = [prefix for prefix in self._prefixes if id(prefix) in first]

    def _place(self, waiting: deque[_Conversation]) -> _Placed:
        """Gives free sequences to waiting prompts, in their order, and to what they share."""
        holding = {prefix.sequence for prefix in self._prefixes}
        free = [
            index
            for index in range(self._layout.sequences)
            if index not in self._running and index not in holding
        ]
        placed: _Placed = []
        while waiting and free:
            each, reuse = waiting[0], NOTHING
            prefix = each.prefix
            if prefix is not None and prefix.sequence is None:
                if len(free) < 2:
                    if not placed and not self._running:
                        # Other prefixes have all other sequences.
                        each.prefix = None
                        continue
                    break
                prefix.sequence = free.pop()
                of_prefix = PlacedPrompt(prefix.inputs, NOTHING, prefix.sequence, prefix.tokens)
                placed.append((of_prefix, prefix))
            if prefix is not None:
                if not prefix.is_ready:
                    break
                reuse = self._copied(each, prefix, free[0])
            sequence = free.pop(0)
            self._running[sequence] = waiting.popleft()
            placed.append((PlacedPrompt(each.inputs, reuse, sequence), each))
        return placed

    def _copied(self, each: _Conversation, prefix: _Prefix, sequence: int) -> Reuse:
        """Copies a prefix into the sequence of a prompt."""
        assert prefix.sequence is not None
        arguments = self._state, np.int32(prefix.sequence), np.int32(sequence)
        self._state = copying_program(self._programs, self._state)(*arguments)
        if prefix.prefill:
            # The first prompt that uses a prefix has it in its statistics.
            each.vision, each.prefill = prefix.vision, prefix.prefill
            prefix.vision = prefix.prefill = 0.0
        else:
            each.reused = prefix.tokens
            each.inputs = self._source.inputs_of(
                each.prompt, each.settings.new_tokens, self._backend, prefix.tokens
            )
        spans = extended((0,), prefix.tokens, each.inputs.template)
        return Reuse(prefix.tokens, spans if each.inputs.is_sparse else (0,))

    def _run_prompts(self, placed: _Placed) -> Iterator[Answered]:
        """Runs prompts, to the first tokens of their answers."""
        check_not_forked(GenerationError)
        owner = {id(prompt): of for prompt, of in placed}
        settings = [getattr(of, "settings", self._unused) for _, of in placed]
        prompts = [prompt for prompt, _ in placed]
        prefill = Prefill(self._programs, prompts, self._layout, settings, self._backend)
        try:
            longest = max(prompts, key=lambda prompt: prompt.end)
            check_memory(longest.inputs, prefill.stages, self._available)
        except CapacityError as error:
            yield from self._refused(placed, error)
            return
        before = (0.0, 0.0)
        for chunk, chosen, state in prefill.run(self._state):
            self._state = state
            now = (prefill.vision_seconds, prefill.seconds)
            for part in chunk.parts:
                share = (part.end - part.start) / chunk.tokens
                of = owner[id(part.prompt)]
                of.vision += share * (now[0] - before[0])
                of.prefill += share * (now[1] - before[1])
            before = now
            for output, part in zip(tokens_of(chosen), chunk.last_parts, strict=False):
                of = owner[id(part.prompt)]
                assert isinstance(of, _Conversation)
                of.answer.add(output)
        for _, of in placed:
            if isinstance(of, _Prefix):
                of.is_ready = True
            else:
                # The pixels are not needed any more.
                of.inputs = replace(of.inputs, images=())
        yield from self._ended()

    def _refused(self, placed: _Placed, error: CapacityError) -> Iterator[Answered]:
        """Refuses prompts that do not fit, such as those with very large images."""
        for prompt, of in placed:
            if isinstance(of, _Prefix):
                of.sequence = None
                self._prefixes.remove(of)
                for each in self._source.waiting[self._rows]:
                    each.prefix = None if each.prefix is of else each.prefix
            else:
                del self._running[prompt.sequence]
                yield self._source.failed(of, error)

    def _decode(self, waiting: int) -> Iterator[Answered]:
        """Goes on with all answers, until enough have ended to let waiting prompts in."""
        check_not_forked(GenerationError)
        of_sequence = [self._running.get(index) for index in range(self._layout.sequences)]
        settings = [of.settings if of else self._unused for of in of_sequence]
        answers = Answers.of([of.inputs if of else None for of in of_sequence], settings)
        # Several prompts fill a chunk better than one.
        ends = min(waiting, max(1, len(self._running) // 4)) or len(self._running)
        steps = _STEPS_BEFORE_STOP if any(of.stop for of in settings) else DECODE_CHUNK
        began = time.perf_counter()
        chosen, self._state = self._decoding.run(self._state, answers, steps=steps, ends=ends)
        share = (time.perf_counter() - began) / len(self._running)
        for sequence, of in self._running.items():
            of.decode += share
            for each in tokens_of(chosen[sequence]):
                of.answer.add(each)
                if of.answer.has_ended:
                    break
        yield from self._ended()

    def _ended(self) -> Iterator[Answered]:
        """Yields the answers that have ended, and frees their sequences."""
        for sequence, of in list(self._running.items()):
            if of.answer.has_ended:
                del self._running[sequence]
                result = of.answer.result(of.inputs, self._stats(of))
                yield Answered(of.task.number, of.copy, result)

    def _stats(self, of: _Conversation) -> Stats:
        inputs, programs, compiled = of.inputs, self._programs, self._compiled
        self._compiled = programs.compile_seconds, programs.compilations
        return Stats(
            prompt_tokens=inputs.tokens,
            image_tokens=inputs.template.image_tokens,
            attention_flops_dense=inputs.flops_dense,
            attention_flops_sparse=inputs.flops_sparse,
            vision_seconds=of.vision,
            prefill_seconds=of.prefill,
            decode_seconds=of.decode,
            compile_seconds=self._compiled[0] - compiled[0],
            compiled_programs=self._compiled[1] - compiled[1],
            backend=self._backend,
            attention_flops_per_kind=inputs.flops_per_kind,
            reused_tokens=of.reused,
        )


def sequences_for(module: ImageTextModel, rows: int, prompts: int, available: int | None) -> int:
    """How many sequences the cache of a batch has: a power of two that leaves memory for the rest.

    Args:
      module: the model.
      rows: rows of a sequence.
      prompts: how many prompts there are.
      available: free bytes on the device; None if unknown.
    """
    cache = size_in_bytes(jax.eval_shape(lambda: module.language_model.empty_cache(rows)))
    sequences = 1
    while sequences < min(prompts, most_sequences()):
        if available is not None and 2 * sequences * cache > available // 2:
            break
        sequences *= 2
    return sequences
