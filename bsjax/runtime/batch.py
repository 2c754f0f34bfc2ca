"""Conversations that run together: chunks with tokens of several, and one decode for all answers.

    waiting   | a sequence of the cache for each                           | answers, as they end
    d e f ... | a: prompt, answer ...   b: prompt, answer ...   c: prompt   |

Prompts of similar length share a cache, a *pool*. When an answer ends, the next prompt takes its
sequence. What several prompts begin with runs once, in a sequence of its own, from which it is
copied (`bsjax.runtime.shared_prefixes`).
"""

from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import check_not_forked
from bsjax.errors import BsjaxError, CapacityError, GenerationError
from bsjax.models import ImageTextModel
from bsjax.models.sharding import mesh_of, sharded_shapes
from bsjax.profiles.profile import Profile
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.prompt import Prompt, PromptOptions
from bsjax.runtime.answers import Answer, tokens_of
from bsjax.runtime.chunks import CacheLayout, Chunk, PlacedPrompt
from bsjax.runtime.decoding import Answers, AnswerSettings, DecodeState, Decoding
from bsjax.runtime.image_cache import image_cache_of
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.memory import bytes_available, check_cache_memory, check_memory
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import Program, Programs, programs_of, size_in_bytes
from bsjax.runtime.results import Result, Stats, seconds_of, stats_of
from bsjax.runtime.reuse import NOTHING, Reuse, extended
from bsjax.runtime.shared_prefixes import common_tokens, shared_prefixes
from bsjax.runtime.sizes import cache_rows, most_sequences
from bsjax.timing import Stopwatch

# Patches of the images of waiting prompts, in the host's memory: about 600 MB.
_MOST_PATCHES = 2**20


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
      seconds: by part, those that no answer has in its statistics yet.
    """

    inputs: ModelInputs
    tokens: int
    sequence: int | None = None
    is_ready: bool = False
    seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))


@dataclass(eq=False)
class _Conversation:
    """A prompt that waits for a sequence, or its answer as it grows.

    Attributes:
      task: the conversation.
      copy: which of its answers it is.
      arrival: how many conversations had been prepared when this one was.
      prompt: the prompt; None once it has run.
      inputs: the prompt as it runs.
      settings: how it is answered.
      answer: the answer so far.
      prefix: what it shares with others.
      is_compared: whether it has been compared with the others that wait.
      reused: how many tokens were copied from a prefix.
      reused_images: how many of its images had been encoded before.
      imbalance: of the devices, while its prompt ran.
      seconds: by part, its share of the time of the batch.
      first_token: seconds from the beginning of the batch to its first token.
    """

    task: Task
    copy: int
    arrival: int
    prompt: Prompt | None
    inputs: ModelInputs
    settings: AnswerSettings
    answer: Answer
    prefix: _Prefix | None = None
    is_compared: bool = False
    reused: int = 0
    reused_images: int = 0
    imbalance: float = 1.0
    seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    first_token: float = 0.0


_Admitted = list[tuple[PlacedPrompt, _Conversation | _Prefix]]


def _share(
    seconds: Mapping[str, float],
    owners: Sequence[_Conversation | _Prefix],
    weights: Sequence[int] | None = None,
) -> None:
    """Divides seconds among those that they were needed for: evenly, or by their weights."""
    weights = [1] * len(owners) if weights is None else weights
    whole = sum(weights)
    for owner, weight in zip(owners, weights, strict=True):
        for part, of_part in seconds.items():
            owner.seconds[part] += of_part * weight / whole


def run_batch(
    model: LoadedModel,
    tasks: Iterable[Task],
    profile: Profile | None,
    options: PromptOptions,
    *,
    return_errors: bool,
    ahead: bool = False,
    stopwatch: Stopwatch | None = None,
) -> Generator[Answered, None, None]:
    """Answers conversations together. Yields answers as they end.

    Args:
      model: from `bsjax.load`.
      tasks: the conversations; they are taken as sequences become free.
      profile: head categories of prefill.
      options: how messages become prompts.
      return_errors: whether a conversation that cannot be answered gives an error in place of an
        answer; otherwise the error is raised.
      ahead: whether conversations stay as they are when others are taken, so that the images of
        several are read side by side. A generator may use a buffer or a file again.
      stopwatch: was made when the batch began, and has counted what came before this call.

    Raises:
      BsjaxError: as for `bsjax.generate`, with the number of the conversation.
    """
    stopwatch = stopwatch or Stopwatch()
    with ImageReader(stopwatch) as reader:
        source = _Source(
            model,
            iter(tasks),
            profile,
            options,
            reader,
            return_errors=return_errors,
            ahead=ahead,
        )
        with closing(_answered(model, source)) as outcomes:
            while True:
                # What is no other part, but not what the caller does with an outcome.
                with stopwatch.part("schedules"):
                    outcome = next(outcomes, None)
                if outcome is None:
                    return
                yield outcome


def _answered(model: LoadedModel, source: "_Source") -> Generator[Answered, None, None]:
    """Yields the outcomes of all conversations of a source."""
    yield from source.fill()
    while source.waiting or source.alone:
        if source.waiting:
            # First the cache that most prompts wait for.
            rows = max(source.waiting, key=lambda rows: len(source.waiting[rows]))
            yield from _Pool(model, source, rows, source.waiting[rows]).run()
            del source.waiting[rows]
        else:
            rows, conversation = source.alone.pop()
            yield from _Pool(model, source, rows, deque([conversation]), alone=True).run()
        yield from source.fill()


class _Source:
    """Prepares prompts, a limited number ahead, and sorts them by the cache that they need.

    Attributes:
      waiting: the prompts that are ready, by the rows of a sequence.
      alone: prompts that need the memory of a cache for themselves, and the rows of a sequence.
      is_exhausted: whether there are no more conversations.
      stopwatch: counts the time of the batch, which is then shared among its conversations.
    """

    def __init__(
        self,
        model: LoadedModel,
        tasks: Iterator[Task],
        profile: Profile | None,
        options: PromptOptions,
        reader: ImageReader,
        *,
        return_errors: bool,
        ahead: bool,
    ) -> None:
        self._ahead = ahead
        self._reader, self.stopwatch = reader, reader.stopwatch
        self.waiting: dict[int, deque[_Conversation]] = {}
        self.alone: list[tuple[int, _Conversation]] = []
        self.is_exhausted = False
        self._arrivals = 0
        self._model, self._tasks, self._options = model, tasks, options
        self._profile = profile
        self._return_errors = return_errors
        self._programs = programs_of(model)
        # All that is free while no pool has a cache.
        self._available = bytes_available(self._programs.mesh)

    def fill(self) -> Iterator[Answered]:
        """Prepares prompts until enough are waiting. Yields the errors of those that cannot run."""
        requested: list[list[_Conversation]] = []
        while self._has_room(requested if self._ahead else ()):
            with self.stopwatch.part("conversations"):
                task = next(self._tasks, None)
            if task is None:
                self.is_exhausted = True
                break
            prepared, failure = self._prepared(task)
            if failure is None:
                requested.append(prepared)
                if not self._ahead:
                    yield from self._completed(prepared)
            else:
                copies = range(len(task.settings))
                yield from (Answered(task.number, copy, failure) for copy in copies)
        for prepared in requested if self._ahead else ():
            yield from self._completed(prepared)

    def _completed(self, prepared: Sequence[_Conversation]) -> Iterator[Answered]:
        """Reads the images of a conversation, which then waits. Yields the errors if it cannot."""
        prompt = prepared[0].prompt
        assert prompt is not None
        try:
            with self.stopwatch.part("images"):
                self._reader.start()
                prompt.complete()
        except BsjaxError as error:
            yield from (self.failed(each, error) for each in prepared)
            return
        finally:
            _share(self.stopwatch.take(), prepared)
        for each in prepared:
            rows = cache_rows(each.inputs.tokens + each.settings.new_tokens)
            self.waiting.setdefault(rows, deque()).append(each)

    def failed(self, conversation: _Conversation, error: BsjaxError) -> Answered:
        """The outcome of a conversation whose prompt cannot run."""
        failure = _named(error, conversation.task.place)
        if not self._return_errors:
            raise failure from error
        return Answered(conversation.task.number, conversation.copy, failure)

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

    def _has_room(self, requested: Sequence[Sequence[_Conversation]]) -> bool:
        queues = [*self.waiting.values(), *requested]
        waiting = [each for queue in queues for each in queue]
        prompts = {id(each.prompt): each.prompt for each in waiting if each.prompt is not None}
        held = sum(image.size for prompt in prompts.values() for image in prompt.images)
        return len(waiting) < 2 * most_sequences() and held < _MOST_PATCHES

    def _prepared(self, task: Task) -> tuple[list[_Conversation], BsjaxError | None]:
        """The prompts of a conversation, or why it has none."""
        requests = self._reader.requests
        try:
            with self.stopwatch.part("prompt"):
                prompt = self._model.prompt_of(task.messages, self._options, self._reader)
            longest = max(settings.new_tokens for settings in task.settings)
            inputs = self.inputs_of(prompt, longest, task.settings[0].backend)
            layout = CacheLayout(cache_rows(inputs.tokens + longest))
            check_cache_memory(inputs, self._programs, layout, self._available)
        except BsjaxError as error:
            self._reader.forget(requests)
            failure = _named(error, task.place)
            if not self._return_errors:
                raise failure from error
            # No answer has this time in its statistics.
            self.stopwatch.take()
            return [], failure
        self._arrivals += 1
        prepared = [
            _Conversation(
                task=task,
                copy=copy,
                arrival=self._arrivals,
                prompt=prompt,
                inputs=inputs,
                settings=settings,
                answer=Answer(self._model.tokenizer, settings),
            )
            for copy, settings in enumerate(task.settings)
        ]
        _share(self.stopwatch.take(), prepared)
        return prepared, None


def _named(error: BsjaxError, place: str | None) -> BsjaxError:
    """An error that names its conversation.

    It is a new one, because a traceback keeps the cache and the pixels of whatever ran.
    """
    return type(error)(str(error) if place is None else f"{place}: {error}")


class _Pool:
    """A cache, and the prompts and answers that have its sequences."""

    def __init__(
        self,
        model: LoadedModel,
        source: _Source,
        rows: int,
        waiting: deque[_Conversation],
        *,
        alone: bool = False,
    ) -> None:
        """Prepares a pool.

        Args:
          model: from `bsjax.load`.
          source: prepares prompts.
          rows: rows of a sequence.
          waiting: the prompts that wait for this cache; there is at least one.
          alone: whether the cache has a single sequence.
        """
        self._model, self._source, self._rows = model, source, rows
        self._waiting, self._alone = waiting, alone
        self._programs, self._stopwatch = programs_of(model), source.stopwatch
        # Programs that no answer has in its statistics yet.
        self._compiled = 0
        self._running: dict[int, _Conversation] = {}
        self._prefixes: list[_Prefix] = []
        first = waiting[0].settings
        self._backend, self._end_tokens = first.backend, first.end_tokens
        self._unused = AnswerSettings(1, first.backend, end_tokens=first.end_tokens)

    def run(self) -> Iterator[Answered]:
        """Answers all prompts that wait for this cache, and those that come meanwhile."""
        yield from self._allocate()
        while self._waiting or self._running:
            while admitted := self._admitted():
                yield from self._run_prompts(admitted)
            if self._running:
                yield from self._decode()
            if not self._alone:
                yield from self._source.fill()

    @contextmanager
    def _may_compile(self) -> Iterator[None]:
        """Counts what the block compiles, which is not what other threads and callers do."""
        before = self._programs.of_this_thread
        try:
            yield
        finally:
            after = self._programs.of_this_thread
            self._stopwatch.move(after[0] - before[0], "schedules", "compiling")
            self._compiled += after[1] - before[1]

    def _allocate(self) -> Iterator[Answered]:
        """Chooses how many sequences there are. Refuses prompts that do not fit even alone."""
        self._available = bytes_available(self._programs.mesh)
        most = len(self._waiting) if self._source.is_exhausted else most_sequences()
        sequences = 1
        if not self._alone:
            sequences = sequences_for(self._model.module, self._rows, most, self._available)
        while self._waiting:
            layout = CacheLayout(self._rows, sequences)
            first = self._waiting[0]
            with self._may_compile():
                failure = self._allocate_for(layout, first)
            _share(self._stopwatch.take(), [first])
            if failure is None:
                return
            if sequences > 1:
                sequences //= 2
            else:
                yield self._source.failed(self._waiting.popleft(), failure)

    def _allocate_for(self, layout: CacheLayout, first: _Conversation) -> CapacityError | None:
        """Allocates a cache of this shape, unless a prompt does not fit beside it."""
        prefill = Prefill(
            self._programs, [PlacedPrompt(first.inputs)], layout, [first.settings], self._backend
        )
        decoding = Decoding(self._programs, layout, self._end_tokens, self._backend)
        stages = [*prefill.stages, *decoding.stages]
        if layout.sequences > 1:
            # A conversation whose images do not fit beside this cache runs alone.
            stages = [stage for stage in stages if stage.name != "vision"]
        try:
            check_memory(first.inputs, stages, self._available, self._programs, layout)
        except CapacityError as error:
            return error
        self._layout, self._decoding = layout, decoding
        self._state = DecodeState.empty(self._programs.module, layout)
        return None

    def _find_prefixes(self) -> None:
        """Looks for what waiting prompts begin with, and forgets what none of them needs.

        Prompts that share a prefix are brought together, so that its sequence is soon free again.
        """
        new = [each for each in self._waiting if not each.is_compared]
        if new and self._layout.sequences > 1:
            known = {id(each): self._longest_prefix(each) for each in new}
            others = [each for each in self._waiting if each.is_compared and each.prefix is None]
            candidates = new + others
            for shared in shared_prefixes([each.inputs for each in candidates]):
                members = [candidates[index] for index in shared.members]
                replaced = [known.get(id(each)) for each in members]
                saved = sum(prefix.tokens for prefix in replaced if prefix is not None)
                if (len(members) - 1) * shared.tokens > saved:
                    prefix = _Prefix(members[0].inputs, shared.tokens)
                    self._prefixes.append(prefix)
                    for each in members:
                        each.prefix = prefix
            for each in new:
                each.prefix = each.prefix or known[id(each)]
        for each in self._waiting:
            each.is_compared = True
        first: dict[int, int] = {}
        for each in self._waiting:
            group = id(each.prefix or each)
            first[group] = min(each.arrival, first.get(group, each.arrival))
        ordered = sorted(self._waiting, key=lambda each: first[id(each.prefix or each)])
        self._waiting.clear()
        self._waiting.extend(ordered)
        for prefix in self._prefixes:
            if id(prefix) not in first:
                _share(prefix.seconds, self._rest())
        self._prefixes = [prefix for prefix in self._prefixes if id(prefix) in first]

    def _longest_prefix(self, conversation: _Conversation) -> _Prefix | None:
        """The longest of the known prefixes that a prompt begins with."""
        fitting = [
            prefix
            for prefix in self._prefixes
            if common_tokens(prefix.inputs, conversation.inputs) >= prefix.tokens
        ]
        return max(fitting, key=lambda prefix: prefix.tokens, default=None)

    def _admitted(self) -> _Admitted:
        """The prompts that run next, and what they share."""
        with self._may_compile():
            self._find_prefixes()
            admitted = self._admit()
        _share(self._stopwatch.take(), [owner for _, owner in admitted] or self._rest())
        return admitted

    def _rest(self) -> list[_Conversation]:
        """Those that are answered or wait for it."""
        return [*self._running.values(), *self._waiting]

    def _admit(self) -> _Admitted:
        """Gives sequences to waiting prompts, and to what they share."""
        holding = {prefix.sequence for prefix in self._prefixes}
        free = [
            index
            for index in range(self._layout.sequences)
            if index not in self._running and index not in holding
        ]
        admitted: _Admitted = []
        for each in list(self._waiting):
            prefix, reuse = each.prefix, NOTHING
            if prefix is not None and prefix.sequence is None and free:
                if len(free) > 1:
                    prefix.sequence = free.pop()
                    placed = PlacedPrompt(prefix.inputs, NOTHING, prefix.sequence, prefix.tokens)
                    admitted.append((placed, prefix))
                elif not admitted and not self._running:
                    # Other prefixes have all other sequences.
                    each.prefix = prefix = None
            if prefix is not None:
                if not prefix.is_ready:
                    continue
                if sum(other.prefix is prefix for other in self._waiting) == 1:
                    # Nobody else needs it.
                    assert prefix.sequence is not None
                    free.insert(0, prefix.sequence)
                    self._prefixes.remove(prefix)
            if not free:
                continue
            if prefix is not None:
                reuse = self._copied(each, prefix, free[0])
            sequence = free.pop(0)
            self._waiting.remove(each)
            self._running[sequence] = each
            admitted.append((PlacedPrompt(each.inputs, reuse, sequence), each))
        return admitted

    def _copied(self, each: _Conversation, prefix: _Prefix, sequence: int) -> Reuse:
        """Copies a prefix into the sequence of a prompt, unless it is there."""
        assert prefix.sequence is not None
        if sequence != prefix.sequence:
            arguments = self._state, np.int32(prefix.sequence), np.int32(sequence)
            with self._may_compile():
                copy = copying_program(self._programs, self._state)
            self._state = copy(*arguments)
        if prefix.seconds:
            # The first prompt that uses a prefix has it in its statistics.
            _share(prefix.seconds, [each])
            prefix.seconds.clear()
        else:
            assert each.prompt is not None
            each.reused = prefix.tokens
            each.inputs = self._source.inputs_of(
                each.prompt, each.settings.new_tokens, self._backend, prefix.tokens
            )
        spans = extended((0,), prefix.tokens, each.inputs.template)
        return Reuse(prefix.tokens, spans if each.inputs.is_sparse else (0,))

    def _run_prompts(self, admitted: _Admitted) -> Iterator[Answered]:
        """Runs prompts, to the first tokens of their answers."""
        check_not_forked(GenerationError)
        owners = {id(prompt): owner for prompt, owner in admitted}
        settings = [
            owner.settings if isinstance(owner, _Conversation) else self._unused
            for _, owner in admitted
        ]
        prompts = [prompt for prompt, _ in admitted]
        with self._may_compile():
            prefill = Prefill(
                self._programs,
                prompts,
                self._layout,
                settings,
                self._backend,
                image_cache=image_cache_of(self._model),
                stopwatch=self._stopwatch,
            )
        _share(self._stopwatch.take(), list(owners.values()))
        known = {id(image) for group in prefill.groups if group.features for image in group.images}
        for _, owner in admitted:
            if isinstance(owner, _Conversation):
                owner.reused_images = sum(id(image) in known for image in owner.inputs.images)
        try:
            check_memory(
                prompts[0].inputs,
                prefill.stages,
                self._available,
                self._programs,
                self._layout,
            )
        except CapacityError as error:
            failure = error
        else:
            failure = None
        if failure is not None:
            if len(admitted) == 1:
                yield from self._refused(*admitted[0], failure)
            else:
                for each in admitted:
                    yield from self._run_prompts([each])
            return
        for chunk, chosen, state in prefill.run(self._state):
            self._state = state
            self._share_chunk(chunk, owners)
            for output, part in zip(tokens_of(chosen), chunk.last_parts, strict=False):
                owner = owners[id(part.prompt)]
                assert isinstance(owner, _Conversation)
                owner.answer.add(output)
                owner.first_token = self._stopwatch.age
        for _, owner in admitted:
            if isinstance(owner, _Prefix):
                owner.is_ready = True
            else:
                owner.imbalance = prefill.imbalance
                # The pixels are not needed any more.
                owner.prompt, owner.inputs = None, replace(owner.inputs, images=())
        yield from self._ended()

    def _share_chunk(self, chunk: Chunk, owners: Mapping[int, _Conversation | _Prefix]) -> None:
        """Shares the time of a chunk by tokens, and that of its images by image tokens."""
        seconds = self._stopwatch.take()
        of_images = {name: seconds.pop(name, 0.0) for name in ("images", "transfer", "vision")}
        of_parts = [owners[id(part.prompt)] for part in chunk.parts]
        tokens = [part.end - part.start for part in chunk.parts]
        image_tokens = [
            int(part.prompt.images_before[part.end] - part.prompt.images_before[part.start])
            for part in chunk.parts
        ]
        _share(seconds, of_parts, tokens)
        _share(of_images, of_parts, image_tokens if any(image_tokens) else tokens)

    def _refused(
        self, prompt: PlacedPrompt, owner: _Conversation | _Prefix, error: CapacityError
    ) -> Iterator[Answered]:
        """Puts aside what does not fit, such as very large images; refuses it if it is alone."""
        if isinstance(owner, _Prefix):
            self._prefixes.remove(owner)
            _share(owner.seconds, self._rest())
            for each in self._waiting:
                each.prefix = None if each.prefix is owner else each.prefix
            return
        del self._running[prompt.sequence]
        if self._layout.sequences > 1:
            assert owner.prompt is not None
            owner.inputs = self._source.inputs_of(
                owner.prompt, owner.settings.new_tokens, self._backend
            )
            owner.prefix, owner.reused = None, 0
            self._source.alone.append((self._rows, owner))
        else:
            yield self._source.failed(owner, error)

    def _decode(self) -> Iterator[Answered]:
        """Goes on with all answers, until enough have ended to let waiting prompts in."""
        check_not_forked(GenerationError)
        conversations = [self._running.get(index) for index in range(self._layout.sequences)]
        settings = [each.settings if each else self._unused for each in conversations]
        answers = Answers.of([each.inputs if each else None for each in conversations], settings)
        # Several prompts fill a chunk better than one.
        ends = min(len(self._waiting), max(1, len(self._running) // 4)) or len(self._running)
        steps = min(each.steps for each in settings)
        with self._stopwatch.part("decode"):
            chosen, self._state = self._decoding.run(self._state, answers, steps=steps, ends=ends)
            for sequence, conversation in self._running.items():
                for token in tokens_of(chosen[sequence]):
                    conversation.answer.add(token)
                    if conversation.answer.has_ended:
                        break
        _share(self._stopwatch.take(), list(self._running.values()))
        yield from self._ended()

    def _ended(self) -> Iterator[Answered]:
        """Yields the answers that have ended, and frees their sequences."""
        for sequence, conversation in list(self._running.items()):
            if conversation.answer.has_ended:
                del self._running[sequence]
                result = conversation.answer.result(conversation.inputs, self._stats(conversation))
                yield Answered(conversation.task.number, conversation.copy, result)

    def _stats(self, conversation: _Conversation) -> Stats:
        programs, self._compiled = self._compiled, 0
        # Counted here, so that the time that it takes is this conversation's.
        _ = conversation.inputs.flops_per_kind
        _share(self._stopwatch.take(), [conversation])
        return stats_of(
            conversation.inputs,
            seconds_of(conversation.seconds),
            backend=self._backend,
            first_token_seconds=conversation.first_token,
            decode_seconds=conversation.seconds["decode"],
            compiled_programs=programs,
            reused_tokens=conversation.reused,
            reused_images=conversation.reused_images,
            imbalance=conversation.imbalance,
        )


def sequences_for(module: ImageTextModel, rows: int, prompts: int, available: int | None) -> int:
    """How many sequences the cache of a batch has: a power of two that leaves memory for the rest.

    Args:
      module: the model.
      rows: rows of a sequence.
      prompts: how many prompts there are.
      available: free bytes on the device; None if unknown.
    """
    shapes = jax.eval_shape(lambda: module.language_model.empty_cache(rows))
    cache = size_in_bytes(sharded_shapes(shapes, mesh_of(nnx.state(module))))
    sequences = 1
    while sequences < min(prompts, most_sequences()):
        if available is not None and 2 * sequences * cache > available // 2:
            break
        sequences *= 2
    return sequences
