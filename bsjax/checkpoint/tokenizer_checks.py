"""Checks of tokenizer.json, made before it is loaded.

A tokenizer is a small program too. Rules that replace each character by ten make gigabytes of one
line, and some regular expressions take hours for it. Its library runs in this process, where
nothing can interrupt it, and ends the process when memory runs out. So only those steps are
accepted whose time and output are bounded by the length of the text.
"""

from collections.abc import Iterator
from typing import Any

from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from bsjax.checks import shown
from bsjax.errors import CheckpointError

_STEPS = {
    "normalizer": {
        *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents"),
        *("BertNormalizer", "Prepend", "Replace"),
    },
    "pre_tokenizer": {
        *("ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"),
        *("Digits", "Punctuation", "Metaspace", "Split", "UnicodeScripts"),
    },
    "post_processor": {
        *("ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing"),
    },
    "decoder": {
        *("ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace", "WordPiece"),
        *("BPEDecoder", "CTC"),
    },
}
"""The types of steps whose output grows with the text and no faster. The library has others, which
no supported family uses."""

# Under which name a sequence of such steps holds them.
_SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}

# Published tokenizers have up to three. Steps such as ByteLevel double what the one before made.
_MOST_STEPS = 4

_LONGEST_PREFIX = 16

# Each takes time in proportion to the text, which cannot be found out by looking at one.
_KNOWN_EXPRESSIONS = (PRETOKENIZE_REGEX,)


def check_tokenizer(settings: dict[str, Any], file: Any) -> None:
    """Rejects a tokenizer with steps whose time or output is not bounded by the text's length.

    Args:
      settings: the contents of tokenizer.json.
      file: named in the message.

    Raises:
      CheckpointError: names the step.
    """
    for part, known in _STEPS.items():
        steps = list(_flat(settings.get(part), _SEQUENCES[part]))
        if len(steps) > _MOST_STEPS:
            raise CheckpointError(
                f"{file} has {len(steps)} steps in its {part}, more than {_MOST_STEPS}."
            )
        for step in steps:
            kind = step.get("type") if isinstance(step, dict) else None
            if not isinstance(kind, str) or kind not in known:
                raise CheckpointError(
                    f"{file} has the {part} {shown(step)}, which bsjax does not run: supported are "
                    f"{', '.join(sorted(known))}."
                )
            problem = _problem(kind, step)
            if problem:
                raise CheckpointError(f"{file} has the {part} {shown(step)}: {problem}.")


def _flat(step: Any, name: str) -> Iterator[Any]:
    """The steps of a part, without the sequences around them."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        inside = step.get(name)
        for each in inside if isinstance(inside, list) else [inside]:
            yield from _flat(each, name)
    elif step is not None:
        yield step


def _problem(kind: str, step: dict[str, Any]) -> str | None:
    """Why a step of a supported type is not run; None if it is."""
    if kind == "TemplateProcessing":
        pieces = step.get("single")
        pieces = pieces if isinstance(pieces, list) else []
        if sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces) != 1:
            return "it must hold the text's tokens exactly once"
    if kind == "Prepend":
        prefix = step.get("prepend")
        if not isinstance(prefix, str) or len(prefix) > _LONGEST_PREFIX:
            return f"it must put at most {_LONGEST_PREFIX} characters before a text"
    if kind in ("Replace", "Split"):
        pattern = step.get("pattern")
        (form, text), *others = pattern.items() if isinstance(pattern, dict) else [(None, None)]
        if form == "Regex" and kind == "Split" and text in _KNOWN_EXPRESSIONS and not others:
            return None
        if form != "String" or not isinstance(text, str) or not text or others:
            return "its pattern must be a text, or the regular expression of Qwen's tokenizer"
        content = step.get("content")
        if kind == "Replace" and not (isinstance(content, str) and len(content) <= len(text)):
            return "it must not replace a text by a longer one"
    return None
