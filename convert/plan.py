"""Matches a checkpoint's tensors with a model's parameters, before any weights are read."""

import dataclasses
import math

import numpy as np

from bsjax.errors import CheckpointError
from bsjax.models.parameters import TRANSFORMS, ParameterRule, canonical_key
from bsjax.models.sharding import KV_HEADS, Q_HEADS
from convert.safetensors_file import FLOAT_DTYPES, TensorEntry, TensorReader
from convert.source import join_names

# Numbers of layers have fewer digits; longer ones take long to read.
_DIGITS = 10

# Rows of tied tensors to compare at a time: tens of megabytes.
_ROWS_COMPARED = 4096

# The shape that a source tensor must have, given its parameter's, for transforms that only reorder
# axes.
_SOURCE_SHAPES = {"copy": lambda shape: shape, "transpose": lambda shape: shape[::-1]}


@dataclasses.dataclass(frozen=True)
class PlannedParameter:
    """One parameter of the model and the tensors it is made from.

    Attributes:
      rule: the parameter's rule in the family's table.
      shape: the parameter's shape, with the leading layer axis if it is stacked.
      dtype: the dtype that it is stored in.
      tensors: its source tensors: one per layer, or a single one if it is not stacked.
      unit: how many entries of the axis that is divided among devices stay together: the channels
        of a head, for heads.
    """

    rule: ParameterRule
    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[TensorEntry, ...]
    unit: int = 1

    @property
    def divided_axis(self) -> int | None:
        """The axis that is divided among devices; None if there is none."""
        for axis, name in enumerate(self.rule.axes):
            if name is not None:
                return axis + (self.rule.layers is not None)
        return None

    @property
    def nbytes(self) -> int:
        """Size of the stored parameter."""
        return math.prod(self.shape) * self.dtype.itemsize


def make_plan(
    table: list[ParameterRule],
    shapes: dict[tuple[str, ...], tuple[int, ...]],
    tensors: dict[str, TensorEntry],
    dtype: np.dtype,
    tied: dict[str, str],
    head_dim: int = 1,
) -> list[PlannedParameter]:
    """Finds the tensors of every parameter, and a parameter for every tensor.

    Args:
      table: the family's rules.
      shapes: the shape of every parameter of the model, by path.
      tensors: the checkpoint's tensors, by their keys in the files.
      dtype: the dtype to store.
      tied: maps canonical keys whose tensors may be copies to the keys they copy.
      head_dim: channels of a head of the language model.

    Raises:
      CheckpointError: keys are missing, unknown or ambiguous; a tensor has the wrong shape or does
        not hold floating-point numbers; or a tensor that should be a copy of another one differs.
    """
    _check_table(table, shapes)
    by_key = _by_canonical_key(tensors)
    _check_layers(table, by_key)
    wanted = {key for rule in table for key in rule.sources}
    missing = sorted(wanted - by_key.keys(), key=_natural)
    unknown = sorted(by_key.keys() - wanted - tied.keys(), key=_natural)
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensors that the model needs: {join_names(missing)}")
    if unknown:
        found = [by_key[key].key for key in unknown]
        problems.append(
            f"has {len(found)} tensors that the model does not have: {join_names(found)}"
        )
    if problems:
        raise CheckpointError(
            f"the checkpoint {'; and it '.join(problems)}. Either its config.json belongs to "
            "another model, or files of two checkpoints are mixed."
        )

    plan = [
        PlannedParameter(
            rule,
            shapes[rule.target],
            dtype,
            tuple(by_key[key] for key in rule.sources),
            head_dim if {Q_HEADS, KV_HEADS} & set(rule.axes) else 1,
        )
        for rule in table
    ]
    quantised = [
        f"{entry.key} ({entry.dtype})"
        for parameter in plan
        for entry in parameter.tensors
        if entry.dtype not in FLOAT_DTYPES
    ]
    if quantised:
        raise CheckpointError(
            f"{len(quantised)} tensors are not {', '.join(FLOAT_DTYPES)}: {join_names(quantised)}. "
            "Quantised checkpoints are not supported: convert the original one."
        )
    for parameter in plan:
        _check_shapes(parameter)
    for copy, original in tied.items():
        if copy in by_key:
            _check_copy(by_key[copy], by_key[original])
    return plan


def _check_copy(copy: TensorEntry, original: TensorEntry) -> None:
    """Rejects a tied tensor that differs from its original: dropping it would change the model."""
    same = (copy.dtype, copy.shape) == (original.dtype, original.shape)
    if same:
        with TensorReader() as one, TensorReader() as other:
            for start in range(0, copy.shape[0], _ROWS_COMPARED):
                rows = slice(start, min(start + _ROWS_COMPARED, copy.shape[0]))
                if one.read(copy, rows).tobytes() != other.read(original, rows).tobytes():
                    same = False
                    break
    if not same:
        raise CheckpointError(
            f"tensor {copy.key} in {copy.file.name} differs from {original.key}, but config.json "
            "says that they are the same (tie_word_embeddings). If the model has a separate output "
            'embedding, set "tie_word_embeddings": false in config.json.'
        )


def _check_table(
    table: list[ParameterRule], shapes: dict[tuple[str, ...], tuple[int, ...]]
) -> None:
    targets = {rule.target for rule in table}
    apart = sorted(".".join(path) for path in targets ^ shapes.keys())
    if apart:
        raise CheckpointError(
            f"the family's parameter table and its model disagree about {join_names(apart)}: "
            "please report this, with the config.json."
        )


def _check_layers(table: list[ParameterRule], tensors: dict[str, TensorEntry]) -> None:
    """Compares the numbers of layers with the tensors' names, before keys are made from them."""
    found: dict[str, int] = {}
    for key in tensors:
        # "...layers.27.mlp.up_proj.weight": the first part that is a number counts the layers.
        parts = key.split(".")
        number = next((place for place, part in enumerate(parts) if _is_number(part)), None)
        if number is not None:
            stack = ".".join(parts[:number])
            found[stack] = max(found.get(stack, 0), int(parts[number]) + 1)
    for rule in table:
        if rule.layers is None:
            continue
        stack = rule.source.partition(".{layer}")[0]
        if rule.layers > found.get(stack, 0):
            raise CheckpointError(
                f"config.json describes {rule.layers} layers in {stack}, but the checkpoint's "
                f"tensors are those of {found.get(stack, 0)}. Either it is not the tensors' "
                "config.json, or tensors are missing."
            )


def _by_canonical_key(tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    by_key: dict[str, TensorEntry] = {}
    for key, entry in tensors.items():
        canonical = canonical_key(key)
        if canonical in by_key:
            raise CheckpointError(
                f"the checkpoint has the same tensor under two names: {by_key[canonical].key} in "
                f"{by_key[canonical].file.name} and {key} in {entry.file.name}."
            )
        by_key[canonical] = entry
    return by_key


def _natural(key: str) -> list[tuple[bool, int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [
        (_is_number(part), int(part) if _is_number(part) else 0, part) for part in key.split(".")
    ]


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < _DIGITS


def _check_shapes(parameter: PlannedParameter) -> None:
    transform = TRANSFORMS[parameter.rule.transform]
    expected = parameter.shape if parameter.rule.layers is None else parameter.shape[1:]
    for entry in parameter.tensors:
        try:
            # One element with zero strides has the shape but takes no memory.
            stand_in = np.broadcast_to(np.zeros((), np.int8), entry.shape)
            becomes = transform(stand_in).shape
        except ValueError:
            becomes = None
        if becomes != expected:
            change = parameter.rule.transform
            wanted = _SOURCE_SHAPES.get(change, lambda shape: shape)(expected)
            after = "" if change in _SOURCE_SHAPES else f" after {change}"
            raise CheckpointError(
                f"tensor {entry.key} in {entry.file.name} has the wrong shape: expected "
                f"{list(wanted)}{after}, found {list(entry.shape)}. Either config.json or that "
                "file belongs to another checkpoint."
            )
