"""Version 1 of the profile file: read strictly, and written to be readable.

The file has one row of letters per layer, one letter per head, and the evidence. Reading is strict
because a profile that does not fit its model silently gives wrong answers.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int8

from bsjax.checks import as_number
from bsjax.errors import ProfileError
from bsjax.files import parse_json
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import LayerFlops
from bsjax.masks.template import Sinks
from bsjax.masks.visibility import Visibility
from bsjax.profiles.criteria import CRITERIA, HAND_SET_CRITERIA
from bsjax.profiles.evidence import AttentionFlops, Evidence, SinkDiscovery

FORMAT = "bsjax profile"
FORMAT_VERSION = 1

LETTERS = {
    "D": HeadCategory.DENSE,
    "S": HeadCategory.SINK,
    "I": HeadCategory.INTRA_IMAGE,
    "B": HeadCategory.INTRA_IMAGE_SINK,
}
LETTER_OF = {category: letter for letter, category in LETTERS.items()}

_Check = Callable[[str, Any], None]
"""Checks the value of a field of this name."""

_LEGEND = {letter: category.name for letter, category in LETTERS.items()}

_NO_EVIDENCE: dict[str, Any] = {
    "thresholds": {},
    "samples": {"count": 0, "held_out": 0, "fingerprint": None},
    "attention_flops": None,
    "attention_flops_per_kind": [],
    "sink_discovery": None,
    "statistics": {},
    "refinement": None,
    "end_to_end": None,
}

# The reduction in the file may differ from the computed one by rounding.
_REDUCTION_TOLERANCE = 1e-9


def parse(text: str) -> dict[str, Any]:
    """Reads the text of a profile file; returns the arguments of `Profile`.

    Raises:
      ProfileError: the text is not JSON, or a field is missing, unknown or invalid; the message
        names the field.
    """
    document = _read_document(text)
    criterion, from_data = document["criterion"], document["from_data"]
    if criterion not in CRITERIA:
        raise ProfileError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if from_data == (criterion in HAND_SET_CRITERIA):
        raise ProfileError(
            f"`from_data` is {json.dumps(from_data)} and `criterion` is {criterion!r}: exactly the "
            f"criteria {' and '.join(map(repr, HAND_SET_CRITERIA))} do not come from data."
        )
    layers, heads = document["layers"], document["heads"]
    categories = _read_categories(document["categories"], layers, heads)
    if not from_data:
        _refuse_evidence(document)
    return {
        "family": document["family"],
        "categories": categories,
        "sinks": Sinks(document["sinks"]["first"], tuple(document["sinks"]["offsets"])),
        "fingerprint": document["checkpoint_fingerprint"],
        "evidence": _read_evidence(document) if from_data else None,
        "source": document["samples"]["source"],
        "versions": document["versions"],
        "is_uniform": criterion == "uniform",
    }


def write(
    *,
    family: str,
    categories: Int8[np.ndarray, "layers heads"],
    sinks: Sinks,
    fingerprint: str | None,
    evidence: Evidence | None,
    source: str,
    versions: Mapping[str, str],
    is_uniform: bool,
) -> str:
    """The text of a profile's file, from the arguments of `Profile` that `parse` returns."""
    layers, heads = categories.shape
    hand_set = "uniform" if is_uniform else "by_hand"
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": family,
        "checkpoint_fingerprint": fingerprint,
        "layers": layers,
        "heads": heads,
        "sinks": {"first": sinks.first, "offsets": list(sinks.offsets)},
        "from_data": evidence is not None,
        "criterion": hand_set if evidence is None else evidence.criterion,
        "category_letters": _LEGEND,
        "categories": [
            "".join(LETTER_OF[HeadCategory(value)] for value in row) for row in categories
        ],
        "versions": dict(versions),
        **(_NO_EVIDENCE if evidence is None else _evidence_fields(evidence)),
    }
    fields["samples"] = _in_order(fields["samples"] | {"source": source}, _SAMPLE_FIELDS)
    return _render(_in_order(fields, _FIELDS)) + "\n"


def _in_order(fields: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in known}


def _read_document(text: str) -> dict[str, Any]:
    """Reads the JSON object of the file and checks that it has all fields, of the right types."""
    document = parse_json(text, "the profile", error=ProfileError, strict=True)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f'This is not a profile: it does not start with "format": "{FORMAT}".')
    if document.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"`format_version` is {document.get('format_version')!r}; this version of bsjax reads "
            f"{FORMAT_VERSION}. Use the version of bsjax that wrote the file, or make the profile "
            "again."
        )
    _check_fields("", document, _FIELDS)
    _check_fields("sinks", document["sinks"], _SINK_FIELDS)
    _check_fields("samples", document["samples"], _SAMPLE_FIELDS)
    if document["sink_discovery"] is not None:
        _check_fields("sink_discovery", document["sink_discovery"], _DISCOVERY_FIELDS)
    for kind in document["attention_flops_per_kind"]:
        _check_fields("attention_flops_per_kind", kind, _KIND_FIELDS)
    if document["category_letters"] != _LEGEND:
        raise ProfileError(f"`category_letters` must be {json.dumps(_LEGEND)}.")
    return document


def _refuse_evidence(document: Mapping[str, Any]) -> None:
    """Rejects measurements in a file whose categories do not come from data."""
    samples = document["samples"]
    present = [
        f"samples.{name}" for name, none in _NO_EVIDENCE["samples"].items() if samples[name] != none
    ]
    present += [
        name for name, none in _NO_EVIDENCE.items() if name != "samples" and document[name] != none
    ]
    if present:
        raise ProfileError(
            f"The criterion {document['criterion']!r} says that this profile does not come from "
            f"data, but it has {', '.join(f'`{name}`' for name in present)}: only `bsjax.profile` "
            "makes measured profiles."
        )


def _read_evidence(document: Mapping[str, Any]) -> Evidence:
    samples, flops = document["samples"], document["attention_flops"]
    for name, value in (
        ("checkpoint_fingerprint", document["checkpoint_fingerprint"]),
        ("samples.fingerprint", samples["fingerprint"]),
        ("attention_flops", flops),
    ):
        if value is None:
            raise ProfileError(
                f"The criterion {document['criterion']!r} says that this profile was measured, but "
                f"it has no `{name}`."
            )
    if set(flops) != {"dense", "sparse", "reduction"}:
        raise ProfileError("`attention_flops` must have dense, sparse and reduction.")
    attention_flops = AttentionFlops(flops["dense"], flops["sparse"])
    if abs(attention_flops.reduction - flops["reduction"]) > _REDUCTION_TOLERANCE:
        raise ProfileError(
            f"`attention_flops`: {flops['sparse']} of {flops['dense']} FLOPs is not a reduction by "
            f"{flops['reduction']}."
        )
    discovery = document["sink_discovery"]
    return Evidence(
        criterion=document["criterion"],
        thresholds=document["thresholds"],
        sample_count=samples["count"],
        held_out_count=samples["held_out"],
        sample_fingerprint=samples["fingerprint"],
        statistics={
            name: _read_table(f"statistics.{name}", rows, document["layers"], document["heads"])
            for name, rows in document["statistics"].items()
        },
        attention_flops=attention_flops,
        attention_flops_per_kind=tuple(
            LayerFlops(
                Visibility(kind["bidirectional_images"], kind["window"]),
                kind["layers"],
                kind["dense"],
                kind["sparse"],
            )
            for kind in document["attention_flops_per_kind"]
        ),
        sink_discovery=None
        if discovery is None
        else SinkDiscovery(discovery["rule"], tuple(discovery["mass_by_offset"])),
        refinement=document["refinement"],
        end_to_end=document["end_to_end"],
    )


def _evidence_fields(evidence: Evidence) -> dict[str, Any]:
    flops, discovery = evidence.attention_flops, evidence.sink_discovery
    return {
        "thresholds": evidence.thresholds,
        "samples": {
            "count": evidence.sample_count,
            "held_out": evidence.held_out_count,
            "fingerprint": evidence.sample_fingerprint,
        },
        "attention_flops": {
            "dense": flops.dense,
            "sparse": flops.sparse,
            "reduction": flops.reduction,
        },
        "attention_flops_per_kind": [
            {
                "bidirectional_images": kind.visibility.bidirectional_images,
                "window": kind.visibility.window,
                "layers": kind.layers,
                "dense": kind.dense,
                "sparse": kind.sparse,
            }
            for kind in evidence.attention_flops_per_kind
        ],
        "sink_discovery": None
        if discovery is None
        else {"rule": discovery.rule, "mass_by_offset": list(discovery.mass_by_offset)},
        "statistics": {name: values.tolist() for name, values in evidence.statistics.items()},
        "refinement": evidence.refinement,
        "end_to_end": evidence.end_to_end,
    }


def _render(value: Any, indent: str = "") -> str:
    """JSON text with objects and lists of lists or strings over several lines, others on one."""
    deeper = indent + "  "
    if isinstance(value, Mapping) and value:
        entries = [f"{json.dumps(key)}: {_render(item, deeper)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list) and value and isinstance(value[0], list | str):
        entries = [_render(item, deeper) for item in value]
        opening, closing = "[", "]"
    else:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False)
    lines = ",\n".join(deeper + entry for entry in entries)
    return f"{opening}\n{lines}\n{indent}{closing}"


def _read_categories(rows: list[str], layers: int, heads: int) -> np.ndarray:
    if len(rows) != layers:
        raise ProfileError(f"`categories` has {len(rows)} rows, but `layers` is {layers}.")
    for layer, row in enumerate(rows):
        if len(row) != heads:
            raise ProfileError(
                f"`categories[{layer}]` has {len(row)} letters, but `heads` is {heads}."
            )
        unknown = sorted(set(row) - set(LETTERS))
        if unknown:
            raise ProfileError(
                f"`categories[{layer}]` has the letter {unknown[0]!r}: the letters are "
                f"{', '.join(f'{letter} ({name})' for letter, name in _LEGEND.items())}."
            )
    return np.array([[LETTERS[letter] for letter in row] for row in rows], np.int8)


def _read_table(name: str, rows: Any, layers: int, heads: int) -> np.ndarray:
    fits = isinstance(rows, list) and len(rows) == layers
    if not fits or not all(isinstance(row, list) and len(row) == heads for row in rows):
        raise ProfileError(f"`{name}` must have {layers} rows of {heads} numbers.")
    for row in rows:
        for value in row:
            _number(name, value)
    return np.array(rows, np.float64)


def _check_fields(name: str, value: Mapping[str, Any], known: Mapping[str, _Check]) -> None:
    """Checks that an object has exactly the known fields, each of the right type."""
    shown = f"`{name}`" if name else "The profile"
    missing = [field for field in known if field not in value]
    unknown = [field for field in value if field not in known]
    if missing:
        raise ProfileError(f"{shown} lacks {', '.join(f'`{field}`' for field in missing)}.")
    if unknown:
        raise ProfileError(
            f"{shown} has {', '.join(f'`{field}`' for field in unknown)}, which format version "
            f"{FORMAT_VERSION} does not have. Its fields are {', '.join(known)}."
        )
    for field, check in known.items():
        check(f"{name}.{field}" if name else field, value[field])


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ProfileError(f"`{name}` must be text, got {value!r}.")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ProfileError(f"`{name}` must be true or false, got {value!r}.")


def _number(name: str, value: Any) -> None:
    if not math.isfinite(as_number(value)):
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:40] + "..."
        raise ProfileError(f"`{name}` must hold finite numbers, got {shown}.")


def _object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ProfileError(f"`{name}` must be an object, got {value!r}.")


def _rows_of_letters(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(row, str) for row in value):
        raise ProfileError(f"`{name}` must be a list of rows of letters, one row per layer.")


def _whole_number_from(least: int) -> _Check:
    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProfileError(f"`{name}` must be a whole number from {least}, got {value!r}.")

    return check


def _or_null(check: _Check) -> _Check:
    return lambda name, value: None if value is None else check(name, value)


def _list_of(what: str, check: _Check) -> _Check:
    def check_list(name: str, value: Any) -> None:
        if not isinstance(value, list):
            raise ProfileError(f"`{name}` must be a list of {what}, got {value!r}.")
        for item in value:
            check(name, item)

    return check_list


def _by_name(check: _Check) -> _Check:
    def check_object(name: str, value: Any) -> None:
        _object(name, value)
        for key, item in value.items():
            check(f"{name}.{key}", item)

    return check_object


_FIELDS: dict[str, _Check] = {
    "format": _text,
    "format_version": _whole_number_from(1),
    "family": _text,
    "checkpoint_fingerprint": _or_null(_text),
    "layers": _whole_number_from(1),
    "heads": _whole_number_from(1),
    "sinks": _object,
    "from_data": _boolean,
    "criterion": _text,
    "thresholds": _by_name(_number),
    "samples": _object,
    "attention_flops": _or_null(_by_name(_number)),
    "attention_flops_per_kind": _list_of("objects", _object),
    "category_letters": _object,
    "categories": _rows_of_letters,
    "sink_discovery": _or_null(_object),
    "statistics": _object,
    "refinement": _or_null(_by_name(_number)),
    "end_to_end": _or_null(_by_name(_number)),
    "versions": _by_name(_text),
}

_SINK_FIELDS: dict[str, _Check] = {
    "first": _whole_number_from(0),
    "offsets": _list_of("whole numbers", _whole_number_from(0)),
}

_SAMPLE_FIELDS: dict[str, _Check] = {
    "count": _whole_number_from(0),
    "held_out": _whole_number_from(0),
    "source": _text,
    "fingerprint": _or_null(_text),
}

_KIND_FIELDS: dict[str, _Check] = {
    "bidirectional_images": _boolean,
    "window": _or_null(_whole_number_from(1)),
    "layers": _whole_number_from(1),
    "dense": _whole_number_from(0),
    "sparse": _whole_number_from(0),
}

_DISCOVERY_FIELDS: dict[str, _Check] = {
    "rule": _text,
    "mass_by_offset": _list_of("numbers", _number),
}
