"""Loads converted checkpoints: weights, configuration, tokenizer and image processor.

`python -m convert` writes a folder:

    parameters/        the weights, an Orbax checkpoint of nested dictionaries of arrays
    manifest.json      size and SHA-256 of every other file
    bsjax.json         the description: format version, family, dtype, fingerprint, source
    config.json, generation_config.json, tokenizer and image processor files: as in the source
"""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from bsjax.checkpoint.folder import PARAMETERS, check_folder, folder_path
from bsjax.checkpoint.manifest import verify_manifest
from bsjax.checkpoint.restoring import Placement, restore_parameters
from bsjax.checkpoint.tokenizer_checks import check_tokenizer
from bsjax.checks import (
    argument,
    check_not_forked,
    is_failure,
    shown,
    truth_value,
    whole_number,
)
from bsjax.errors import CapacityError, CheckpointError
from bsjax.files import read_json_object
from bsjax.masks.categories import HeadCategory
from bsjax.models import FAMILIES, Architecture, Family, ImageTextModel
from bsjax.models.collectives import TENSOR
from bsjax.models.config_checks import check_settings
from bsjax.models.head_order import HeadOrder, dealt_heads
from bsjax.models.sharding import (
    KV_HEADS,
    Q_HEADS,
    WeightBytes,
    checked_mesh,
    divides,
    key_head_repeats,
    size_along,
    spec_of,
    with_repeated_key_heads,
)
from bsjax.progress import Progress, reporting
from bsjax.prompts.prompt import Processor
from bsjax.prompts.sources import DEFAULT_SOURCES, ImageSources

FORMAT_VERSION = 1
"""Increased whenever older converted checkpoints can no longer be read."""

DESCRIPTION = "bsjax.json"
"""The file by which a folder is recognised as a converted checkpoint."""

UNFINISHED = ".converting-"
"""Part of the name of a folder whose conversion has not finished."""

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes in which weights can be stored and used."""

MAX_PROGRAMS = 64
"""How many compiled programs a model keeps, unless `load` is told otherwise. On a CPU, each takes
about 6 MiB of memory, whatever the size of the model."""

_OF_IMAGES = ("preprocessor_config.json", "processor_config.json")
_OF_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""The form of a checkpoint's name on the Hugging Face hub, such as "Qwen/Qwen2-VL-2B-Instruct"."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False, kw_only=True)
class DescribedModel(Processor):
    """A model without its weights: all that its folder says about it, and what makes its input.

    It is all that prompts, profiles and arguments can be checked against. Reading it takes a moment
    where reading weights takes seconds or minutes.

    Attributes:
      config: the Hugging Face configuration.
      family: the family of the config's `model_type`.
      tokenizer: the tokenizer, which holds the chat template.
      image_processor: the image processor, PIL version; None for a model that reads text only.
      generation_config: end-of-sequence tokens and sampling defaults.
      dtype: dtype that the weights have, or will have, in memory.
      stored_dtype: dtype of the weights in the folder.
      path: the checkpoint's folder.
      fingerprint: SHA-256 of the weights that the checkpoint was converted from, as 64 hexadecimal
        digits. It does not depend on the dtype of the converted checkpoint.
      image_sources: where images of messages may come from, and limits on them.
      max_programs: how many compiled programs are kept for the model.
      image_cache_bytes: the most bytes of image features that are kept for its calls.
      mesh: the devices that the weights are divided among, or will be; None for one device.
      head_order: the order of heads on these devices; None for that of the checkpoint.
    """

    generation_config: GenerationConfig
    dtype: np.dtype
    stored_dtype: str
    path: Path
    fingerprint: str
    max_programs: int = MAX_PROGRAMS
    image_cache_bytes: int = 0
    mesh: Mesh | None = None
    head_order: HeadOrder | None = None

    @property
    @override
    def shares_images(self) -> bool:
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def architecture(self) -> Architecture:
        """What the weights are for."""
        return Architecture(self.family, self.config, self.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedModel(DescribedModel):
    """A model ready to run, with everything that turns messages into its input.

    Attributes:
      module: the Flax module with its weights, on the default device or on those of the mesh. All
        other attributes are those of `DescribedModel`.
    """

    module: ImageTextModel


def load(
    path: str | Path,
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    head_categories: Int[np.ndarray, "layers q_heads"] | None = None,
    verify: bool = False,
    max_programs: int = MAX_PROGRAMS,
    image_cache_bytes: int = 0,
    image_sources: ImageSources = DEFAULT_SOURCES,
    progress: Progress | bool | None = None,
) -> LoadedModel:
    """Loads a converted checkpoint onto the default device, or divides it among several.

    Always checked: that all files and parameters are there, their shapes and dtypes, and a checksum
    of every piece of the weights that is read. This finds damaged files, but not intact files that
    replaced the original ones; `verify` finds those too.

    Args:
      path: a folder written by `python -m convert`.
      dtype: "float32", "bfloat16" or "float16" (or the NumPy or JAX dtype). Weights are cast to
        it while they are read. By default float32 on a CPU, whose matrix products are fastest in
        float32, and bfloat16 elsewhere.
      mesh: the devices that the model is divided among, from `bsjax.mesh`; None for the default
        device. No device holds the whole model, and the host only parts of a parameter at a time.
        Each process reads what its own devices need.
      head_categories: `Profile.categories` of the profile that the model will run with, so that the
        heads that take long do not all go to the same devices of the mesh. The model can run with
        any profile, whatever is given here.
      verify: first compare the SHA-256 of every file with the one that was written when the
        checkpoint was converted, as `bsjax verify` does. Takes the time to read all files once.
      max_programs: how many compiled programs to keep in memory. There is one for every stage and
        bucket of sizes, so that prompts of many sizes need many. Beyond this number, the least
        recently used program is dropped. When it is needed again, it is compiled, or read from
        JAX's persistent cache.
      image_cache_bytes: the most bytes of host memory for the features of images, by their pixels.
        An image that comes again, in any conversation, then needs no vision tower
        (`Result.stats.reused_images`). 0, the default, keeps none. What does not fit is dropped,
        least recently used first.
      image_sources: where images of messages may come from, and limits on them. A service that
        answers other people's messages should restrict them here.
      progress: None shows a progress bar if stderr is a terminal, False shows nothing; or a
        function called as `progress(stage, done, total)`, in bytes, by the thread that reads.

    Raises:
      CheckpointError: the folder is missing, not converted, only partly converted, of a newer
        format, of an unsupported family or damaged, or fails verification; or `dtype` is not one of
        the three, or `max_programs` is below 1, or `image_cache_bytes` below 0; or the model cannot
        be divided among the devices of the mesh; or this process was forked from one that had used
        JAX.
      CapacityError: a device has less memory than its weights need.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise CheckpointError(f"progress must be None, False or a function, got {shown(progress)}.")
    with WeightsReader(progress) as reader:
        described = describe(
            path,
            dtype,
            mesh=mesh,
            head_categories=head_categories,
            verify=verify,
            max_programs=max_programs,
            image_cache_bytes=image_cache_bytes,
            image_sources=image_sources,
            reader=reader,
        )
        return reader.model(described)


def describe(
    path: str | Path,
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    head_categories: Int[np.ndarray, "layers q_heads"] | None = None,
    verify: bool = False,
    max_programs: int = MAX_PROGRAMS,
    image_cache_bytes: int = 0,
    image_sources: ImageSources = DEFAULT_SOURCES,
    reader: "WeightsReader | None" = None,
) -> DescribedModel:
    """All of `load` that needs no weights. The arguments and the errors are those of `load`.

    What is known about a model without its weights is enough to find most mistakes in what it will
    be asked: do so before `with_weights`. A `reader` begins to read the weights as soon as it is
    known what they are.
    """
    check_not_forked(CheckpointError)
    mesh = checked_mesh(mesh)
    verify = truth_value("verify", verify, error=CheckpointError)
    max_programs = whole_number("max_programs", max_programs, least=1, error=CheckpointError)
    image_cache_bytes = whole_number(
        "image_cache_bytes", image_cache_bytes, least=0, error=CheckpointError
    )
    if not isinstance(image_sources, ImageSources):
        raise CheckpointError(f"image_sources must be ImageSources, got {shown(image_sources)}.")
    folder = folder_path(path)
    _refuse_unconverted(folder, path)
    if verify:
        verify_manifest(folder)
    return dataclasses.replace(
        _describe_folder(folder, dtype, reader, mesh, head_categories),
        max_programs=max_programs,
        image_cache_bytes=image_cache_bytes,
        image_sources=image_sources,
    )


def with_weights(described: DescribedModel, progress: Progress | bool | None = None) -> LoadedModel:
    """Reads the weights of a model onto its devices.

    Args:
      described: from `describe`.
      progress: as for `load`.

    Raises:
      CheckpointError: the weights are damaged, or of another model.
    """
    with WeightsReader(progress) as reader:
        return reader.model(described)


class WeightsReader:
    """Reads weights onto devices in a thread, while the caller does something else.

    A context manager. If it is left before the weights have been read, reading stops.
    """

    def __init__(self, progress: Progress | bool | None = None) -> None:
        """Reads nothing yet.

        Args:
          progress: as for `load`.
        """
        self._progress = progress
        self._stopped = False
        self._reading: Future[ImageTextModel] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> "WeightsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._exit.close()

    def begin(
        self,
        folder: Path,
        architecture: Architecture,
        mesh: Mesh | None,
        stored: str,
        head_order: HeadOrder | None = None,
    ) -> "Future[ImageTextModel]":
        """Begins to read; returns the module to come.

        Args:
          folder: the checkpoint's folder.
          architecture: what the weights are for.
          mesh: the devices that they are divided among; None for the default one.
          stored: the dtype of the weights in the folder.
          head_order: the order of heads; None for that of the checkpoint.
        """
        thread = self._exit.enter_context(ThreadPoolExecutor(1, thread_name_prefix="bsjax weights"))
        report = self._exit.enter_context(reporting(self._progress, in_bytes=True))
        self._begun_with = head_order
        self._reading = thread.submit(
            _restore,
            folder / PARAMETERS,
            architecture,
            mesh,
            stored,
            report,
            self._look,
            head_order,
        )
        return self._reading

    def model(self, described: DescribedModel) -> LoadedModel:
        """The model with its weights, when they have been read.

        Args:
          described: from `describe`, which was given this reader or none.

        Raises:
          CheckpointError: the weights are damaged, or of another model.
        """
        if self._reading is not None and self._begun_with != described.head_order:
            raise CheckpointError("The weights are being read with another order of heads.")
        reading = self._reading or self.begin(
            described.path,
            described.architecture,
            described.mesh,
            described.stored_dtype,
            described.head_order,
        )
        known = {each.name: getattr(described, each.name) for each in fields(DescribedModel)}
        return LoadedModel(module=reading.result(), **known)

    def _look(self) -> None:
        if self._stopped:
            raise _StoppedError


class _StoppedError(Exception):
    """Ends the reading of weights that nobody needs any more."""


def read_folder(folder: Path, dtype: Any = None) -> LoadedModel:
    """Like `load`, but accepts a folder of any name: conversions are verified before being renamed.

    Raises:
      CheckpointError: as for `load`.
    """
    return with_weights(_describe_folder(folder, dtype), progress=False)


def _describe_folder(
    folder: Path,
    dtype: Any,
    reader: WeightsReader | None = None,
    mesh: Mesh | None = None,
    head_categories: Any = None,
) -> DescribedModel:
    target = resolve_dtype(dtype)
    description = _read_description(folder)
    config, family = _read_architecture(folder)
    if description["family"] != family.name:
        raise CheckpointError(
            f"{folder} was converted as {description['family']}, but its config.json is for "
            f"{family.name}: one of the two comes from another checkpoint. Convert it again."
        )
    if target.name not in family.dtypes:
        raise CheckpointError(
            f"{family.name} models cannot run in {target.name}: their activations exceed its "
            f"range. Load {folder} with {argument('dtype')} {' or '.join(family.dtypes)}."
        )
    if mesh is not None:
        key_head_repeats(config, mesh.shape[TENSOR])
    head_order = _head_order(config, mesh, head_categories)
    if reader is not None:
        architecture = Architecture(family, config, target)
        reader.begin(folder, architecture, mesh, description["dtype"], head_order)
    processor = _read_processor(folder, config, family)
    return DescribedModel(
        config=config,
        family=family,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        generation_config=read_generation_config(folder),
        dtype=target,
        stored_dtype=description["dtype"],
        mesh=mesh,
        head_order=head_order,
        path=folder,
        fingerprint=description["fingerprint"],
    )


def with_heads_dealt(described: DescribedModel, head_categories: Any) -> DescribedModel:
    """A model, before its weights are read, for the `head_categories` of `load`.

    Raises:
      CheckpointError: they are not those of a profile for the model.
    """
    order = _head_order(described.config, described.mesh, head_categories)
    return dataclasses.replace(described, head_order=order)


def _head_order(
    config: PretrainedConfig, mesh: Mesh | None, head_categories: Any
) -> HeadOrder | None:
    if head_categories is None:
        return None
    text = config.get_text_config()
    shape = (text.num_hidden_layers, text.num_attention_heads)
    categories = np.asarray(head_categories)
    if (
        categories.shape != shape
        or categories.dtype.kind not in "iu"
        or not np.isin(categories, list(HeadCategory)).all()
    ):
        raise CheckpointError(
            "head_categories must be the `categories` of a profile for this model, with "
            f"{shape[1]} heads in each of {shape[0]} layers, got {shown(head_categories)}."
        )
    if mesh is None or mesh.shape[TENSOR] == 1:
        return None
    return dealt_heads(categories, text.num_key_value_heads, mesh.shape[TENSOR])


def read_processor(folder: Path) -> Processor:
    """Reads everything needed to make prompts for a checkpoint, converted or not.

    Raises:
      CheckpointError: a file is missing or damaged, or the family is not supported.
    """
    return _read_processor(folder, *_read_architecture(folder))


def _read_architecture(folder: Path) -> tuple[PretrainedConfig, Family]:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no config.json.")
    check_folder(folder)
    config = read_config(folder)
    return config, family_of(config.model_type, folder)


def _read_processor(folder: Path, config: PretrainedConfig, family: Family) -> Processor:
    image_processor = family.image_processor
    # transformers reads them again, but not with these limits.
    for name in _OF_TOKENIZERS:
        if (folder / name).exists():
            settings = read_json_object(folder / name, error=CheckpointError)
            # transformers would read the tokenizer from that file, wherever it is.
            if settings.get("gguf_file") is not None:
                raise CheckpointError(
                    f"{folder / name} names a GGUF file, which bsjax does not read: leave out "
                    "gguf_file."
                )
    # transformers may prefer a file such as tokenizer.4.0.0.json.
    for file in sorted(folder.glob("tokenizer*.json")):
        if file.name not in _OF_TOKENIZERS:
            check_tokenizer(read_json_object(file, error=CheckpointError), file)
    for name in _OF_IMAGES:
        if (folder / name).exists():
            settings = read_json_object(folder / name, error=CheckpointError)
            check_settings(settings, folder / name)
    return Processor(
        config,
        family,
        _tokenizer(folder),
        None
        if image_processor is None
        else _component(folder, "image processor settings", image_processor),
    )


def resolve_dtype(dtype: Any) -> np.dtype:
    """Resolves the argument `dtype` of `load`.

    Raises:
      CheckpointError: it is not one of `DTYPES`.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        resolved = jnp.dtype(dtype)
    except (TypeError, ValueError):
        resolved = None
    if resolved is None or resolved.name not in DTYPES:
        raise CheckpointError(
            f"{argument('dtype')} {shown(dtype)} is not one of {', '.join(DTYPES)}."
        )
    return resolved


def family_of(model_type: Any, folder: Path) -> Family:
    """The family of a `model_type`.

    Raises:
      CheckpointError: it is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{folder / 'config.json'} is for a {shown(model_type)} model. Supported: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def read_config(folder: Path) -> PretrainedConfig:
    """Reads config.json. Never runs code that it refers to.

    Raises:
      CheckpointError: it is missing or does not describe a model.
    """
    file = folder / "config.json"
    check_settings(read_json_object(file, error=CheckpointError), file)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Each field's own check in transformers raises an exception of its own kind.
        raise CheckpointError(f"cannot read {file}: {error}") from error


def abstract_module(architecture: Architecture) -> ImageTextModel:
    """The model with shapes in place of weights, which needs no memory.

    Raises:
      CheckpointError: the configuration does not describe a model.
    """
    family, config, dtype = architecture
    try:
        return nnx.eval_shape(lambda: family.build(config, dtype))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json does not describe a model: {error}") from error


def placed_module(
    architecture: Architecture, mesh: Mesh | None, head_order: HeadOrder | None = None
) -> tuple[ImageTextModel, dict[tuple[str, ...], Placement]]:
    """The model with shapes in place of weights, and where each parameter goes, by its path.

    The shapes of a model on a mesh have their shardings, and as many key heads as its devices need.

    Args:
      architecture: architecture of the model.
      mesh: the devices; None for the default one.
      head_order: the order of heads; None for that of the checkpoint.

    Raises:
      CheckpointError: the configuration does not describe a model, or it cannot be divided.
    """
    if mesh is None:
        module = abstract_module(architecture)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = parameter_shapes(module)
        return module, {path: Placement(shape, here) for path, shape in shapes.items()}
    family, config, _ = architecture
    repeats = key_head_repeats(config, mesh.shape[TENSOR])
    module = abstract_module(architecture._replace(config=with_repeated_key_heads(config, repeats)))
    shapes = parameter_shapes(module)
    head_dim = family.text_head_dim(config)
    placements = {}
    for rule in family.parameter_table(config):
        axes = rule.axes if rule.layers is None or not rule.axes else (None, *rule.axes)
        order = None
        if head_order is not None and Q_HEADS in rule.axes:
            order = head_order.q_heads
        # Key heads that are repeated stay in their order.
        if head_order is not None and KV_HEADS in rule.axes and repeats == 1:
            order = head_order.kv_heads
        placements[rule.target] = Placement(
            shapes[rule.target],
            NamedSharding(mesh, spec_of(axes)),
            repeats if rule.axes[-1:] == (KV_HEADS,) else 1,
            head_dim,
            order,
        )
    graph, state = nnx.split(module)
    placed = {
        path: variable.replace(
            jax.ShapeDtypeStruct(
                variable.shape,
                variable.dtype,
                sharding=placements[tuple(map(str, path))].sharding,
            )
        )
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(placed)), placements


def parameter_shapes(module: nnx.Module) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of an abstract module, by its path."""
    return {
        tuple(map(str, path)): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def _refuse_unconverted(folder: Path, asked: str | Path) -> None:
    if UNFINISHED in folder.absolute().name:
        raise CheckpointError(
            f"{folder} is an unfinished conversion: interrupted, or still running. Delete it and "
            "convert again."
        )
    # Unlike the methods of Path, these do not raise for a name that no path can have.
    if os.path.isfile(folder / DESCRIPTION):
        return
    convert = f"python -m convert {asked} DESTINATION"
    if not os.path.exists(folder):
        hint = "Give the folder that python -m convert wrote."
        if HUB_ID.fullmatch(str(asked)):
            hint = f"If this is a Hugging Face hub id, convert it first: {convert}"
        raise CheckpointError(f"there is no folder {folder}. {hint}")
    if os.path.isfile(folder / "config.json"):
        raise CheckpointError(
            f"{folder} is a Hugging Face checkpoint that is not converted yet: {convert}"
        )
    raise CheckpointError(f"{folder} holds no {DESCRIPTION}: it is not a converted checkpoint.")


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    description = read_json_object(file, error=CheckpointError)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {shown(version)}, but this bsjax reads {FORMAT_VERSION}. "
            "Convert the checkpoint again, or use the bsjax that wrote it."
        )
    absent = [key for key in ("family", "dtype", "fingerprint") if key not in description]
    if absent:
        raise CheckpointError(
            f"{file} lacks {', '.join(absent)}: it is damaged. Convert the checkpoint again."
        )
    names = description.get("files", [])
    fingerprint = description["fingerprint"]
    wrong = [
        field
        for field, is_right in (
            ("family", isinstance(description["family"], str)),
            ("dtype", description["dtype"] in DTYPES),
            ("fingerprint", isinstance(fingerprint, str) and bool(_SHA256.fullmatch(fingerprint))),
            ("files", isinstance(names, list) and all(isinstance(name, str) for name in names)),
        )
        if not is_right
    ]
    if wrong:
        raise CheckpointError(
            f"{file} has an invalid {' and '.join(wrong)}: it is damaged. Convert the checkpoint "
            "again."
        )
    # Unlike Path.is_file, os.path.isfile does not raise for a string that cannot be a path.
    lost = [name for name in names if not os.path.isfile(folder / name)]
    if lost:
        raise CheckpointError(
            f"{folder} no longer has {', '.join(lost)}. Convert the checkpoint again."
        )
    return description


def _restore(
    folder: Path,
    architecture: Architecture,
    mesh: Mesh | None,
    stored: str,
    progress: Progress,
    look: Callable[[], None],
    head_order: HeadOrder | None = None,
) -> ImageTextModel:
    module, placements = placed_module(architecture, mesh, head_order)
    tensor = size_along(mesh, TENSOR)
    check_weights_fit(
        module,
        jax.local_devices()[:1] if mesh is None else mesh.local_devices,
        lambda times: divides(architecture.config.get_text_config(), times * tensor),
    )
    graph, state = nnx.split(module)
    arrays = restore_parameters(folder, placements, stored, progress, look)
    filled = {
        path: variable.replace(arrays[tuple(map(str, path))])
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(filled))


def check_weights_fit(
    module: ImageTextModel, devices: Sequence[Any], can_divide: Callable[[int], bool]
) -> None:
    """Rejects a model whose weights do not fit, before any of them is read.

    Args:
      module: with shapes in place of weights.
      devices: those of this process that it goes to. Of the kinds that do not say how much memory
        they have, such as CPUs, nothing is checked.
      can_divide: whether the weights can be divided among so many times as many devices.

    Raises:
      CapacityError: the message says how much is needed and available, and how to need less.
    """
    weights = WeightBytes.of(nnx.state(module))
    for device in devices:
        statistics = device.memory_stats() or {}
        if "bytes_limit" not in statistics:
            continue
        free = statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
        if weights.all > free:
            more = next(
                (
                    times
                    for times in range(2, 17)
                    if weights.on(times) < 0.9 * free and can_divide(times)
                ),
                0,
            )
            advice = f"divide them among {more} times as many devices ({argument('tensor')})"
            raise CapacityError(
                f"The weights need {weights.all / 2**30:.2f} GiB on device {device.id} "
                f"({device.device_kind}), which has {free / 2**30:.2f} GiB free: "
                f"{advice if more else 'use devices with more memory'}."
            )


def _component(folder: Path, what: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except BaseException as error:
        # transformers and tokenizers raise bare Exceptions for damaged files.
        if not is_failure(error):
            raise
        raise CheckpointError(f"cannot read the {what} in {folder}: {error}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = _component(folder, "tokenizer", AutoTokenizer)
    # Hugging Face's processors prefer this file to the tokenizer's own template, which does not
    # support images in some older checkpoints.
    file = folder / "chat_template.json"
    if file.is_file():
        template = read_json_object(file, error=CheckpointError).get("chat_template")
        if not isinstance(template, str):
            raise CheckpointError(f"{file} has no text under chat_template: it is damaged.")
        tokenizer.chat_template = template
    return tokenizer


def read_generation_config(folder: Path) -> GenerationConfig:
    """Reads generation_config.json; if there is none, derives it from config.json.

    Raises:
      CheckpointError: it is damaged, or its end-of-sequence tokens are not token ids.
    """
    config = _any_generation_config(folder)
    ids = config.eos_token_id
    for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if type(token) is not int or not 0 <= token < 2**31:
            raise CheckpointError(
                f"the generation config in {folder} has the end-of-sequence token {shown(token)}: "
                "eos_token_id must be a token id or a list of them."
            )
    return config


def _any_generation_config(folder: Path) -> GenerationConfig:
    file = folder / "generation_config.json"
    if file.exists():
        read_json_object(file, error=CheckpointError)
        return _component(folder, "generation_config.json", GenerationConfig)
    return GenerationConfig.from_model_config(read_config(folder))
