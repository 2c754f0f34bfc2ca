"""What a generation gives back: the answer, its text as it grows, and what it took."""

from dataclasses import dataclass
from typing import Any

from bsjax.masks.flops import LayerFlops


@dataclass(frozen=True)
class Stats:
    """What a generation took.

    Attributes:
      prompt_tokens: tokens of the prompt, image tokens included.
      image_tokens: tokens of each image.
      attention_flops_dense: FLOPs of the language model's attention in prefill, all heads dense.
      attention_flops_sparse: the same with the profile's categories.
      vision_seconds: image processing on the host excluded.
      prefill_seconds: embedding, prefill and the first token.
      decode_seconds: all tokens after the first.
      compile_seconds: programs that this call compiled, or read from the persistent cache.
      backend: the attention backend.
      attention_flops_per_kind: the FLOPs apart for each kind of layers: with a window, without.
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


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
      text: the answer, special tokens left out.
      token_ids: the tokens generated, the end-of-sequence token included if one was.
      prompt_tokens: tokens of the prompt.
      finish_reason: `stop` at an end-of-sequence token, `length` at `max_new_tokens`.
      stats: sizes, FLOPs and seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    stats: Stats


class IncrementalText:
    """Text of a growing list of tokens, handed out piece by piece, whole characters only."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Tokens handed out last, which what follows may read differently after, and those since.
        self._context: list[int] = []
        self._pending: list[int] = []
        self.whole = ""

    def add(self, token_id: int, *, last: bool) -> str:
        """The text that this token completes; empty while a character's bytes are still missing."""
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
