"""What calls return: an answer, its statistics and its text as it is generated; a score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bsjax.attention import backend_reason
from bsjax.checks import argument, shown
from bsjax.errors import GenerationError
from bsjax.masks.flops import LayerFlops
from bsjax.runtime.inputs import ModelInputs


@dataclass(frozen=True)
class Stats:
    """Sizes, FLOPs and times of a generation.

    Attributes:
      prompt_tokens: tokens of the prompt, image tokens included.
      image_tokens: tokens of each image.
      attention_flops_dense: FLOPs of the language model's attention in prefill, if all heads were
        dense. In the last layer only the prompt's last token has a query. Tokens that were in
        the cache already (`reused_tokens`) count as keys only.
      attention_flops_sparse: the same with the profile's categories.
      first_token_seconds: time from the call to the first token. For a single conversation it is
        the sum of the seconds that follow, `decode_seconds` excepted: each moment that the call
        waits counts for one of them. What runs meanwhile, such as other images that are being read,
        counts for none. A stream reads its images before it starts. In a batch, the time from the
        beginning of the batch, other conversations and what the caller does between results
        included. All other seconds of an answer are its share there: those of all answers,
        `decode_seconds` included, add up to the time of the batch. What is done for one answer
        alone counts for that one, and what is done for several for each of them alike: of a chunk,
        by its tokens; of vision, by its image tokens. What prompts begin with alike counts for the
        first of them. Conversations that give an error have no share.
      prompt_seconds: time to render the chat template, to tokenize, and to look at the headers of
        images.
      image_seconds: time to wait for images that are read and scaled in other threads.
      schedule_seconds: time to compute positions and schedules; in a batch, also for all that is
        none of the others, such as to choose what runs together, and to count FLOPs.
      transfer_seconds: time to wait for pixels that are copied to the device.
      vision_seconds: time to wait for the vision tower.
      prefill_seconds: time in prefill, including the choice of the first token.
      decode_seconds: time to generate all tokens after the first, and the text of all.
      compile_seconds: time to compile programs, or to read them from the persistent cache.
      compiled_programs: how many programs were compiled or read. `bsjax.warmup` does this before
        the first prompt arrives. In a batch, the next answer that ends has them.
      backend: the attention backend.
      attention_flops_per_kind: attention FLOPs, dense and sparse, for each kind of layer, local or
        global.
      reused_tokens: tokens of the prompt that were in the cache already, from earlier calls of a
        session or from another conversation of a batch that begins alike.
      reused_images: images among the other tokens whose features were kept (`image_cache_bytes`),
        so that the vision tower had nothing to do.
      imbalance: how much more attention in prefill the device of a mesh that has the most has than
        an average one, as a factor: of the blocks that its rows visit, times that of the FLOPs of
        its heads in this prompt; 1 on one device. In a batch, that of the prompts that ran
        together.
    """

    prompt_tokens: int
    image_tokens: tuple[int, ...]
    attention_flops_dense: int
    attention_flops_sparse: int
    first_token_seconds: float
    prompt_seconds: float
    image_seconds: float
    schedule_seconds: float
    transfer_seconds: float
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    backend: str
    attention_flops_per_kind: tuple[LayerFlops, ...] = ()
    compiled_programs: int = 0
    reused_tokens: int = 0
    reused_images: int = 0
    imbalance: float = 1.0
    backend_reason: str = ""


_PARTS = {
    "prompt": "prompt_seconds",
    "images": "image_seconds",
    "schedules": "schedule_seconds",
    "compiling": "compile_seconds",
    "transfer": "transfer_seconds",
    "vision": "vision_seconds",
    "prefill": "prefill_seconds",
}


def seconds_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """The fields of `Stats` for the parts of the time to the first token."""
    return {field: seconds.get(part, 0.0) for part, field in _PARTS.items()}


def stats_of(
    inputs: ModelInputs,
    parts: Mapping[str, float],
    *,
    backend: str,
    first_token_seconds: float,
    decode_seconds: float,
    compiled_programs: int,
    reused_tokens: int,
    reused_images: int,
    imbalance: float,
) -> Stats:
    """The statistics of an answer.

    Args:
      inputs: the prompt.
      parts: from `seconds_of`.
      backend: the attention backend.
      first_token_seconds: as in `Stats`, like the arguments that follow.
      decode_seconds: see `Stats`.
      compiled_programs: see `Stats`.
      reused_tokens: see `Stats`.
      reused_images: see `Stats`.
      imbalance: see `Stats`.
    """
    return Stats(
        prompt_tokens=inputs.tokens,
        image_tokens=inputs.template.image_tokens,
        attention_flops_dense=inputs.flops_dense,
        attention_flops_sparse=inputs.flops_sparse,
        attention_flops_per_kind=inputs.flops_per_kind,
        **parts,
        backend=backend,
        first_token_seconds=first_token_seconds,
        decode_seconds=decode_seconds,
        compiled_programs=compiled_programs,
        reused_tokens=reused_tokens,
        reused_images=reused_images,
        imbalance=imbalance,
        backend_reason=backend_reason(backend),
    )


class TokenScores(NamedTuple):
    """How likely the model found a token that it generated.

    Log-probabilities are the model's own, before the repetition penalty, the temperature and what
    leaves tokens out.

    Attributes:
      log_probability: that of the token.
      top: ids and log-probabilities of the likeliest tokens, likeliest first.
    """

    log_probability: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
      text: the answer, without special tokens.
      token_ids: the generated tokens, including the end-of-sequence token if there is one.
      prompt_tokens: tokens of the prompt.
      finish_reason: `stop` (ended by an end-of-sequence token or a stop text) or `length` (by
        `max_new_tokens`).
      stats: sizes, FLOPs and seconds.
      log_probabilities: one entry for each token; None if they were not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    stats: Stats
    log_probabilities: tuple[TokenScores, ...] | None = None


@dataclass(frozen=True)
class Score:
    """How likely a model finds an answer, given all that comes before it.

    Attributes:
      log_probability: natural logarithm of the probability of all scored tokens: the sum of
        `log_probabilities`.
      is_greedy: whether each scored token is the likeliest one, given all tokens before it.
      token_ids: the scored tokens: those of the answer's text, without the end of the turn.
      log_probabilities: the logarithm of the probability of each, given all tokens before it.
      prompt_tokens: tokens before the first scored one.
    """

    log_probability: float
    is_greedy: bool
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    prompt_tokens: int


class Token(NamedTuple):
    """A generated token.

    Attributes:
      text: the text that it completes; empty while bytes of a character are missing.
      token_id: its id.
    """

    text: str
    token_id: int


class IncrementalText:
    """The text of a growing list of tokens, in pieces of whole characters.

    Text that may be the beginning of a stop text is held back until it is known whether it is.

    Args:
      tokenizer: decodes the tokens.
      stop: texts that end the answer.

    Attributes:
      whole: the text so far.
      stopped: whether a stop text has come. The text ends before the first one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Tokens of the last piece, because text can depend on the tokens before it.
        self._context: list[int] = []
        # Tokens since then.
        self._pending: list[int] = []
        self._held = ""
        self.whole = ""
        self.stopped = False

    @property
    def holds_back(self) -> bool:
        """Whether there is text that is not in `whole` yet."""
        return bool(self._held or self._pending)

    def add(self, token_id: int, *, last: bool) -> str:
        """The text that this token completes; empty while bytes of a character are missing."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        piece = self._held + text[len(self._decode(self._context)) :]
        self._context, self._pending = self._pending, []
        found = [position for stop in self._stop if (position := piece.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = piece[: min(found)], ""
        else:
            kept = 0 if last else self._begun(piece)
            piece, self._held = piece[: len(piece) - kept], piece[len(piece) - kept :]
        self.whole += piece
        return piece

    def _begun(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


_MOST_STOPS = 64
_LONGEST_STOP = 1000


def checked_stop(stop: Any) -> tuple[str, ...]:
    """The `stop` argument of `bsjax.generate` as texts.

    Raises:
      GenerationError: it is not a text or a list of texts, or has an empty text, or too much text.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not (
        isinstance(stops, list | tuple)
        and len(stops) <= _MOST_STOPS
        and all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in stops)
    ):
        raise GenerationError(
            f"{argument('stop')} must be a text of 1 to {_LONGEST_STOP} characters, a list of at "
            f"most {_MOST_STOPS} of them, or None, got {shown(stop)}."
        )
    return tuple(stops)
