"""The results of a generation: the answer, its statistics, and its text as it is generated."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from bsjax.masks.flops import LayerFlops


@dataclass(frozen=True)
class Stats:
    """Sizes, FLOPs and times of a generation.

    Attributes:
      prompt_tokens: tokens of the prompt, image tokens included.
      image_tokens: tokens of each image.
      attention_flops_dense: FLOPs of the language model's attention in prefill, if all heads were
        dense. Every layer counts in full, although the last one attends from a single row.
        Tokens that a session had in its cache count as keys only.
      attention_flops_sparse: the same with the profile's categories.
      vision_seconds: time in the vision tower, without image processing on the host.
      prefill_seconds: time in prefill, including the choice of the first token.
      decode_seconds: time to generate all tokens after the first.
      compile_seconds: time to compile programs, or to read them from the persistent cache.
      compiled_programs: how many programs were compiled or read. `bsjax.warmup` does this before
        the first prompt arrives.
      backend: the attention backend.
      attention_flops_per_kind: attention FLOPs, dense and sparse, for each kind of layer, local or
        global.
      reused_tokens: tokens of the prompt that a session had in its cache.
    """

    prompt_tokens: int
    image_tokens: tuple[int, ...]
    attention_flops_dense: int
    attention_flops_sparse: int
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    backend: str
    attention_flops_per_kind: tuple[LayerFlops, ...] = ()
    compiled_programs: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
      text: the answer, without special tokens.
      token_ids: the generated tokens, including the end-of-sequence token if there is one.
      prompt_tokens: tokens of the prompt.
      finish_reason: `stop` (ended by an end-of-sequence token) or `length` (by `max_new_tokens`).
      stats: sizes, FLOPs and seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    stats: Stats


class Token(NamedTuple):
    """A generated token.

    Attributes:
      text: the text that it completes; empty while bytes of a character are missing.
      token_id: its id.
    """

    text: str
    token_id: int


class IncrementalText:
    """The text of a growing list of tokens, in pieces of whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Tokens of the last piece, because text can depend on the tokens before it.
        self._context: list[int] = []
        # Tokens since then.
        self._pending: list[int] = []
        self.whole = ""

    def add(self, token_id: int, *, last: bool) -> str:
        """The text that this token completes; empty while bytes of a character are missing."""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        piece = text[len(self._decode(self._context)) :]
        self._context, self._pending = self._pending, []
        self.whole += piece
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
