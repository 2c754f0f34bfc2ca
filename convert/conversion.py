"""Converts a Hugging Face checkpoint, from the first check to the final rename."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsjax.checkpoint.folder import PARAMETERS, folder_path
from bsjax.checkpoint.loading import (
    DESCRIPTION,
    FORMAT_VERSION,
    abstract_module,
    family_of,
    parameter_shapes,
    read_config,
    resolve_dtype,
)
from bsjax.checkpoint.manifest import MANIFEST, write_manifest
from bsjax.checks import check_not_forked
from bsjax.errors import CheckpointError
from bsjax.models import Architecture, Family
from bsjax.models.parameters import tied_keys
from convert.plan import PlannedParameter, make_plan
from convert.safetensors_file import FLOAT_DTYPES, TensorEntry, TensorReader
from convert.source import Source, open_source
from convert.streaming import Fingerprint, chunk_shape, inner_chunk_shape, pieces
from convert.trial import try_logits, try_prompt
from convert.verify import Verification, require_torch, verify
from convert.writing import (
    StreamedParameter,
    check_destination,
    check_disk_space,
    check_stopped,
    publish,
    remove_unfinished,
    write_parameters,
)

TRIAL_BYTES = 2**30
"""Largest model, in bytes of float32, that a trial prompt is run through. Conversion is meant to
need little memory, and this needs memory for the whole model."""

_COPIED = ("*.json", "*.txt", "*.jinja", "LICENSE*")
_NOT_COPIED = ("*.index.json", MANIFEST)
_TOKENIZER = ("tokenizer.json", "vocab.json")
_IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
      destination: the folder written.
      family: the model's family.
      reads_images: whether the model has a vision tower.
      dtype: dtype of the stored weights.
      parameters: number of weights.
      arrays: number of arrays that the weights are stored in.
      nbytes: size of the weights as stored.
      seconds: duration of the conversion, without verification.
      fingerprint: SHA-256 of the source weights.
      manifest: fingerprint of the manifest, which `bsjax verify` compares.
      tried: whether the logits of a prompt were found finite.
      verification: the result of the comparison with transformers, if it was asked for.
    """

    destination: Path
    family: str
    reads_images: bool
    dtype: str
    parameters: int
    arrays: int
    nbytes: int
    seconds: float
    fingerprint: str
    manifest: str
    tried: bool
    verification: Verification | None


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    check: bool = False,
    trial: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a Hugging Face checkpoint into one that `bsjax.load` reads.

    Needs memory for about the largest tensor, whatever the size of the model. `destination` appears
    only when everything in it is on the disk. What earlier conversions to `destination` left behind
    when they were killed is removed.

    Args:
      source: a local folder or a hub id.
      destination: the folder to write. It must be empty or not exist.
      dtype: "float32", "bfloat16" or "float16"; by default the dtype of most source weights.
      revision: the hub's branch, tag or commit.
      check: compare the converted model with transformers before it is published. Needs torch,
        and memory for the model in float32.
      trial: run a small prompt through the converted model before it is published, unless its
        weights take more than `TRIAL_BYTES` in float32, or `check` runs it anyway.
      progress: called with (bytes read, bytes to read) as the conversion goes on.

    Raises:
      CheckpointError: the source is missing, damaged, pickled, incomplete or of another family; its
        weights or its logits are not finite; the family cannot run in `dtype`; the destination
        exists or does not fit on the disk; verification failed; or this process was forked from one
        that had used JAX.
    """
    check_not_forked(CheckpointError)
    started = time.monotonic()
    target = folder_path(destination)
    check_destination(target)
    remove_unfinished(target)
    if check:
        require_torch()
    opened, family, plan, copied = prepare(source, revision, dtype)
    size = sum(parameter.nbytes for parameter in plan)
    check_disk_space(target, size + sum(file.stat().st_size for file in copied))

    fingerprint = Fingerprint()
    with publish(target) as temporary:
        _write(temporary, plan, fingerprint, progress)
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        description = _description(opened, family.name, plan, fingerprint.hexdigest(), copied)
        text = json.dumps(description, indent=2) + "\n"
        (temporary / DESCRIPTION).write_text(text, encoding="utf-8")
        manifest = write_manifest(temporary)
        seconds = time.monotonic() - started
        tried = trial and not check and _bytes_in_float32(plan) <= TRIAL_BYTES
        if tried:
            try_logits(temporary)
        verification = verify(opened.folder, temporary, _rounds(plan)) if check else None

    return Conversion(
        destination=target,
        family=family.name,
        reads_images=family.reads_images,
        dtype=plan[0].dtype.name,
        parameters=description["parameters"]["count"],
        arrays=len(plan),
        nbytes=size,
        seconds=seconds,
        fingerprint=fingerprint.hexdigest(),
        manifest=manifest,
        tried=tried or check,
        verification=verification,
    )


def _bytes_in_float32(plan: list[PlannedParameter]) -> int:
    return sum(4 * math.prod(parameter.shape) for parameter in plan)


class Preparation(NamedTuple):
    """What a conversion will do, found out before weights are read."""

    source: Source
    family: Family
    plan: list[PlannedParameter]
    copied: list[Path]
    """Files that are copied unchanged."""


def prepare(source: str | Path, revision: str | None = None, dtype: Any = None) -> Preparation:
    """Checks everything about a source but its weights, and plans its conversion.

    Raises:
      CheckpointError: see `convert_checkpoint`.
    """
    stored = None if dtype is None else resolve_dtype(dtype)
    opened = open_source(source, revision)
    family = family_of(opened.config["model_type"], opened.folder)
    copied = _files_to_copy(opened.folder, reads_images=family.reads_images)
    if stored is None:
        stored = _usual_dtype(opened.tensors)
    elif stored.name not in family.dtypes:
        raise CheckpointError(
            f"Models of the family {family.name} cannot run in {stored.name}, and weights stored "
            f"in it would be rounded twice. Convert with dtype {' or '.join(family.dtypes)}."
        )
    config = read_config(opened.folder)
    module = abstract_module(Architecture(family, config, stored))
    shapes = parameter_shapes(module)
    plan = make_plan(
        family.parameter_table(config),
        {path: tuple(leaf.shape) for path, leaf in shapes.items()},
        opened.tensors,
        stored,
        tied_keys(config),
        family.text_head_dim(config),
    )
    try_prompt(opened.folder, module)
    return Preparation(opened, family, plan, copied)


def _write(
    folder: Path,
    plan: list[PlannedParameter],
    fingerprint: Fingerprint,
    progress: Progress | None,
) -> None:
    total = sum(entry.size for parameter in plan for entry in parameter.tensors)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        check_stopped()
        done += count
        if progress is not None:
            progress(done, total)

    with TensorReader() as reader:
        write_parameters(
            folder / PARAMETERS,
            {
                parameter.rule.target: StreamedParameter(
                    parameter.shape,
                    parameter.dtype,
                    chunk_shape(parameter),
                    inner_chunk_shape(parameter),
                    functools.partial(pieces, parameter, reader, fingerprint, advance),
                )
                for parameter in plan
            },
        )


def _files_to_copy(folder: Path, *, reads_images: bool) -> list[Path]:
    """The files to copy. Rejects a folder without the files that loading needs."""
    lacking = [
        " or ".join(names)
        for names in (_TOKENIZER, *([_IMAGE_SETTINGS] if reads_images else []))
        if not any((folder / name).is_file() for name in names)
    ]
    if lacking:
        raise CheckpointError(
            f"{folder} has no {', and no '.join(lacking)}: without these files, a converted "
            "checkpoint could not turn messages into prompts. Copy them from the original model."
        )
    files = {file for pattern in _COPIED for file in folder.glob(pattern) if file.is_file()}
    files -= {file for pattern in _NOT_COPIED for file in folder.glob(pattern)}
    return sorted(files)


def _usual_dtype(tensors: dict[str, TensorEntry]) -> np.dtype:
    """The dtype of most of the weights."""
    sizes: Counter[str] = Counter()
    for entry in tensors.values():
        if entry.dtype in FLOAT_DTYPES:
            sizes[entry.dtype] += entry.size
    if not sizes:
        raise CheckpointError(
            f"the checkpoint has no tensor in {', '.join(FLOAT_DTYPES)}: it is quantised or "
            "empty. Convert the original checkpoint."
        )
    return FLOAT_DTYPES[sizes.most_common(1)[0][0]]


def _rounds(plan: list[PlannedParameter]) -> str | None:
    """The stored dtype if some weights are rounded to it; None if all are stored exactly."""
    for parameter in plan:
        for entry in parameter.tensors:
            source = FLOAT_DTYPES[entry.dtype]
            if source != parameter.dtype and parameter.dtype.name != "float32":
                return parameter.dtype.name
    return None


def _description(
    source: Source, family: str, plan: list[PlannedParameter], fingerprint: str, copied: list[Path]
) -> dict[str, Any]:
    packages = ("bsjax", "jax", "flax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "format_version": FORMAT_VERSION,
        "family": family,
        "dtype": plan[0].dtype.name,
        "fingerprint": fingerprint,
        "source": {
            "name": source.name,
            "revision": source.revision,
            "dtypes": sorted({e.dtype for parameter in plan for e in parameter.tensors}),
        },
        "parameters": {
            "count": sum(int(np.prod(parameter.shape, dtype=np.int64)) for parameter in plan),
            "arrays": len(plan),
            "bytes": sum(parameter.nbytes for parameter in plan),
        },
        "files": sorted(file.name for file in copied),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
