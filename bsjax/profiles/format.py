"""Version 1 of the profile file: strict reading to plain values, writing for people to read."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import LayerFlops
from bsjax.masks.template import Sinks
from bsjax.masks.visibility import Visibility

FORMAT = "bsjax profile"
FORMAT_VERSION = 1

LETTERS = {
    "D": HeadCategory.DENSE,
    "S": HeadCategory.SINK,
    "I": HeadCategory.INTRA_IMAGE,
    "B": HeadCategory.INTRA_IMAGE_SINK,
}
UNMEASURED_CRITERIA = ("uniform", "by_hand")
LEGEND = {letter: category.name for letter, category in LETTERS.items()}


def parse(text: str) -> dict[str, Any]:
    """Reads a profile file's text to the arguments of `Profile`.

    Raises:
      ProfileError: it is not JSON, or a field is missing, unknown, or not what it must be; the
        message names the field.
    """
    try:
        document = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except ProfileError:
        raise
    except (ValueError, RecursionError) as error:  # Integers of thousands of digits too.
        raise ProfileError(f"This is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f'This is not a profile: it does not start with "format": "{FORMAT}".')
    if document.get("format_version") != FORMAT_VERSION:
        raise ProfileError(
            f"`format_version` is {document.get('format_version')!r}; this version of bsjax reads "
            f"{FORMAT_VERSION}. Use the version of bsjax that wrote the file, or make the profile "
            "again."
        )
    _check_fields("the profile", document, _FIELDS)
    for name, check in _FIELDS.items():
        check(name, document[name])
    _check_fields("`sinks`", document["sinks"], ("first", "offsets"))
    _check_fields("`samples`", document["samples"], _SAMPLE_FIELDS)
    _count("sinks.first", document["sinks"]["first"])
    _counts("sinks.offsets", document["sinks"]["offsets"])
    for name, check in _SAMPLE_FIELDS.items():
        check(f"samples.{name}", document["samples"][name])
    if document["sink_discovery"] is not None:
        _check_fields("`sink_discovery`", document["sink_discovery"], _DISCOVERY_FIELDS)
        for name, check in _DISCOVERY_FIELDS.items():
            check(f"sink_discovery.{name}", document["sink_discovery"][name])
    for kind in document["attention_flops_per_kind"]:
        _check_fields("`attention_flops_per_kind`", kind, _KIND_FIELDS)
        for name, check in _KIND_FIELDS.items():
            check(f"attention_flops_per_kind.{name}", kind[name])
    if document["category_letters"] != LEGEND:
        raise ProfileError(f"`category_letters` must be {json.dumps(LEGEND)}.")
    if document["from_data"] == (document["criterion"] in UNMEASURED_CRITERIA):
        raise ProfileError(
            f"`from_data` is {json.dumps(document['from_data'])} and `criterion` is "
            f"{document['criterion']!r}: exactly the criteria "
            f"{' and '.join(map(repr, UNMEASURED_CRITERIA))} do not come from data."
        )
    layers, heads = document["layers"], document["heads"]
    return {
        "family": document["family"],
        "categories": _read_categories(document["categories"], layers, heads),
        "sinks": Sinks(document["sinks"]["first"], tuple(document["sinks"]["offsets"])),
        "fingerprint": document["checkpoint_fingerprint"],
        "criterion": document["criterion"],
        "thresholds": document["thresholds"],
        "sample_count": document["samples"]["count"],
        "held_out_count": document["samples"]["held_out"],
        "sample_source": document["samples"]["source"],
        "sample_fingerprint": document["samples"]["fingerprint"],
        "attention_flops": document["attention_flops"],
        "attention_flops_per_kind": tuple(
            LayerFlops(
                Visibility(kind["bidirectional_images"], kind["window"]),
                kind["layers"],
                kind["dense"],
                kind["sparse"],
            )
            for kind in document["attention_flops_per_kind"]
        ),
        "sink_discovery": document["sink_discovery"],
        "refinement": document["refinement"],
        "statistics": {
            name: _read_table(f"statistics.{name}", rows, layers, heads)
            for name, rows in document["statistics"].items()
        },
        "end_to_end": document["end_to_end"],
        "versions": document["versions"],
    }


def render(value: Any, indent: str = "") -> str:
    """JSON text: objects and lists of lists or texts on several lines, lists of numbers on one."""
    deeper = indent + "  "
    if isinstance(value, Mapping) and value:
        entries = [f"{json.dumps(key)}: {render(item, deeper)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list) and value and isinstance(value[0], list | str):
        entries = [render(item, deeper) for item in value]
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
                f"{', '.join(f'{letter} ({name})' for letter, name in LEGEND.items())}."
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


def _check_fields(name: str, value: Mapping[str, Any], known: Any) -> None:
    missing = [field for field in known if field not in value]
    unknown = [field for field in value if field not in known]
    if missing:
        raise ProfileError(f"{name} lacks {', '.join(f'`{field}`' for field in missing)}.")
    if unknown:
        raise ProfileError(
            f"{name} has {', '.join(f'`{field}`' for field in unknown)}, which format version "
            f"{FORMAT_VERSION} does not know. Its fields are {', '.join(known)}."
        )


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ProfileError(f"`{name}` must be text, got {value!r}.")


def _text_or_null(name: str, value: Any) -> None:
    if value is not None:
        _text(name, value)


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ProfileError(f"`{name}` must be true or false, got {value!r}.")


def _count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ProfileError(f"`{name}` must be a whole number from 0, got {value!r}.")


def _positive_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProfileError(f"`{name}` must be a whole number from 1, got {value!r}.")


def _positive_count_or_null(name: str, value: Any) -> None:
    if value is not None:
        _positive_count(name, value)


def _counts(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ProfileError(f"`{name}` must be a list of whole numbers, got {value!r}.")
    for item in value:
        _count(name, item)


def _number(name: str, value: Any) -> None:
    try:
        finite = isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # An int that no float comes near.
        finite = False
    if isinstance(value, bool) or not finite:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:40] + "..."
        raise ProfileError(f"`{name}` must hold finite numbers, got {shown}.")


def _numbers(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ProfileError(f"`{name}` must be a list of numbers, got {value!r}.")
    for item in value:
        _number(name, item)


def _object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ProfileError(f"`{name}` must be an object, got {value!r}.")


def _list_of_objects(name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ProfileError(f"`{name}` must be a list of objects, got {value!r}.")
    for item in value:
        _object(name, item)


def _object_or_null(name: str, value: Any) -> None:
    if value is not None:
        _object(name, value)


def _rows_of_letters(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(row, str) for row in value):
        raise ProfileError(f"`{name}` must be a list of rows of letters, one row per layer.")


def _numbers_by_name(name: str, value: Any) -> None:
    _object(name, value)
    for key, item in value.items():
        _number(f"{name}.{key}", item)


def _numbers_by_name_or_null(name: str, value: Any) -> None:
    if value is not None:
        _numbers_by_name(name, value)


def _texts_by_name(name: str, value: Any) -> None:
    _object(name, value)
    for key, item in value.items():
        _text(f"{name}.{key}", item)


_FIELDS: dict[str, Callable[[str, Any], None]] = {
    "format": _text,
    "format_version": _positive_count,
    "family": _text,
    "checkpoint_fingerprint": _text_or_null,
    "layers": _positive_count,
    "heads": _positive_count,
    "sinks": _object,
    "from_data": _boolean,
    "criterion": _text,
    "thresholds": _numbers_by_name,
    "samples": _object,
    "attention_flops": _numbers_by_name_or_null,
    "attention_flops_per_kind": _list_of_objects,
    "category_letters": _object,
    "categories": _rows_of_letters,
    "sink_discovery": _object_or_null,
    "statistics": _object,
    "refinement": _numbers_by_name_or_null,
    "end_to_end": _numbers_by_name_or_null,
    "versions": _texts_by_name,
}

_SAMPLE_FIELDS: dict[str, Callable[[str, Any], None]] = {
    "count": _count,
    "held_out": _count,
    "source": _text,
    "fingerprint": _text_or_null,
}

_KIND_FIELDS: dict[str, Callable[[str, Any], None]] = {
    "bidirectional_images": _boolean,
    "window": _positive_count_or_null,
    "layers": _positive_count,
    "dense": _count,
    "sparse": _count,
}

_DISCOVERY_FIELDS: dict[str, Callable[[str, Any], None]] = {
    "rule": _text,
    "mass_by_offset": _numbers,
}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ProfileError(f"`{key}` appears twice.")
        result[key] = value
    return result


def _refuse_constant(text: str) -> None:
    raise ProfileError(f"{text} is not a number that JSON knows.")
