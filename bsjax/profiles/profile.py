"""Profiles: which category every query head of one checkpoint has, and the JSON file that says so.

The file is for people as much as for programs: one row of letters per layer, one letter per head,
and beside it what was measured, on what, and how far the sparse model is from the dense one.
Reading is strict, because a profile that does not fit its model gives wrong answers without any
other sign.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8

from bsjax.checks import whole_number
from bsjax.errors import ProfileError, TemplateError
from bsjax.masks.categories import HeadCategory, KeyGroup
from bsjax.masks.flops import LayerFlops
from bsjax.masks.template import Sinks
from bsjax.profiles import format as profile_format

MEASURED_CRITERIA = ("output_error", "mass")
"""How the profiler chooses categories from data."""

CRITERIA = (*MEASURED_CRITERIA, *profile_format.UNMEASURED_CRITERIA)
"""How categories were chosen. "uniform" means one category for all heads and "by_hand" any others:
neither comes from data."""

MEASURED_STATISTICS = (
    *(f"mass_{group.name}" for group in KeyGroup),
    *(f"error_{category.name}" for category in HeadCategory if category),
)
"""What a measured profile says of every head: attention mass of each key group, mean over the
samples; relative error of each sparse category's output, in the quantile over the samples."""

DAMAGE_STATISTICS = tuple(f"damage_{category.name}" for category in HeadCategory if category)
"""What a refined profile says of every head too: KL(dense || sparse), in nats, of next-token
distributions when this head alone has the category."""

# Masses are sums of many float32 numbers.
_MASS_TOLERANCE = 1e-3

_LETTER_OF = {category: letter for letter, category in profile_format.LETTERS.items()}


@dataclass(frozen=True, eq=False)
class Profile:
    """A category for every query head of every language-model layer of one checkpoint.

    Raises:
      ProfileError: a value is out of range, or shapes disagree.
    """

    family: str
    """`model_type` of the checkpoint's configuration, such as "qwen2_5_vl"."""
    categories: Int8[np.ndarray, "layers heads"]
    """`HeadCategory` values."""
    sinks: Sinks = field(default_factory=Sinks)
    fingerprint: str | None = None
    """The checkpoint's fingerprint; None fits any checkpoint of this family and these counts."""
    criterion: str = "by_hand"
    """One of `CRITERIA`."""
    thresholds: Mapping[str, int | float] = field(default_factory=dict)
    """The numbers the criterion was used with, by name."""
    sample_count: int = 0
    """Samples that the categories were chosen with."""
    held_out_count: int = 0
    """Samples that the choice was checked on."""
    sample_source: str = ""
    """Where the samples came from, in words."""
    sample_fingerprint: str | None = None
    """Of all samples, held-out ones too; None when there are none."""
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What was measured for each head, by name: float64 [layers, heads] each. See
    `MEASURED_STATISTICS` and `DAMAGE_STATISTICS`."""
    attention_flops: Mapping[str, int | float] | None = None
    """`dense` and `sparse`, over the samples the categories were chosen with, and `reduction`."""
    attention_flops_per_kind: tuple[LayerFlops, ...] = ()
    """The same apart for each kind of layers that the model has: with a window, without."""
    sink_discovery: Mapping[str, Any] | None = None
    """`mass_by_offset` (what one query of another image pays to one key at each offset from an
    image's first token, on average) and `rule`, in words; None where sinks were given."""
    refinement: Mapping[str, int | float] | None = None
    """What refining end to end measured, by name; None when categories are the one-shot rule's."""
    end_to_end: Mapping[str, int | float] | None = None
    """Sparse against dense answers on held-out samples, by name; None when not measured."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of what made the profile, by package; and, where it was measured, the `dtype` and
    attention `backend` of that."""

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or not self.family:
            raise ProfileError(
                f"`family` must be a model type such as 'qwen2_vl', got {self.family!r}."
            )
        categories = np.array(self.categories)
        if categories.ndim != 2 or not categories.size:
            raise ProfileError(
                f"`categories` must have one row per layer and one entry per head, got the shape "
                f"{categories.shape}."
            )
        if categories.dtype.kind not in "iu" or not np.isin(categories, list(HeadCategory)).all():
            raise ProfileError(
                f"`categories` must hold HeadCategory values, {min(HeadCategory)} to "
                f"{max(HeadCategory)}."
            )
        categories = categories.astype(np.int8)
        categories.setflags(write=False)
        object.__setattr__(self, "categories", categories)
        if self.fingerprint is not None and not (
            isinstance(self.fingerprint, str) and self.fingerprint
        ):
            raise ProfileError(f"`fingerprint` must be text or None, got {self.fingerprint!r}.")
        if self.criterion not in CRITERIA:
            raise ProfileError(
                f"`criterion` must be one of {', '.join(CRITERIA)}, got {self.criterion!r}."
            )
        if self.criterion == "uniform" and np.any(categories != categories.flat[0]):
            raise ProfileError(
                "The criterion 'uniform' is for one category in all heads; others that come from "
                "no data are 'by_hand'."
            )
        whole_number("`sample_count`", self.sample_count, least=0, error=ProfileError)
        whole_number("`held_out_count`", self.held_out_count, least=0, error=ProfileError)
        if not isinstance(self.sinks, Sinks):
            raise ProfileError(f"`sinks` must be bsjax.Sinks, got {self.sinks!r}.")
        self._check_texts()
        # Measurements come as NumPy's and JAX's numbers; the file holds Python's.
        object.__setattr__(self, "thresholds", _numbers("thresholds", self.thresholds))
        for name in ("end_to_end", "attention_flops", "refinement"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        for name, values in self.statistics.items():
            if not np.isfinite(np.asarray(values, np.float64)).all():
                raise ProfileError(f"`statistics[{name!r}]` holds numbers that are not finite.")
            if np.shape(values) != categories.shape:
                raise ProfileError(
                    f"`statistics[{name!r}]` has the shape {np.shape(values)}: it must have one "
                    f"number per layer and head, {categories.shape}."
                )
        if self.from_data:
            self._check_measured()
        else:
            self._check_unmeasured()

    def _check_texts(self) -> None:
        """Refuses what the file could not hold, or would be refused for when it is read."""
        if not isinstance(self.sample_source, str):
            raise ProfileError(f"`sample_source` must be text, got {self.sample_source!r}.")
        if not isinstance(self.sample_fingerprint, str | None):
            raise ProfileError(
                f"`sample_fingerprint` must be text or None, got {self.sample_fingerprint!r}."
            )
        if not isinstance(self.versions, Mapping) or not all(
            isinstance(part, str) for entry in self.versions.items() for part in entry
        ):
            raise ProfileError(f"`versions` must map names to texts, got {self.versions!r}.")

    def _check_unmeasured(self) -> None:
        """Refuses what would make a profile that no data is behind look like a measured one."""
        measured = {
            "sample_count": self.sample_count,
            "held_out_count": self.held_out_count,
            "sample_fingerprint": self.sample_fingerprint,
            "thresholds": self.thresholds,
            "statistics": self.statistics,
            "attention_flops": self.attention_flops,
            "attention_flops_per_kind": self.attention_flops_per_kind,
            "sink_discovery": self.sink_discovery,
            "refinement": self.refinement,
            "end_to_end": self.end_to_end,
        }
        present = [name for name, value in measured.items() if value]
        if present:
            raise ProfileError(
                f"The criterion {self.criterion!r} says that this profile does not come from data, "
                f"but it has {', '.join(f'`{name}`' for name in present)}: only `bsjax.profile` "
                "makes measured profiles."
            )

    def _check_measured(self) -> None:
        """Refuses a profile that says it was measured and lacks, or contradicts, what was."""
        for name in ("fingerprint", "sample_fingerprint", "attention_flops"):
            if getattr(self, name) is None:
                raise ProfileError(
                    f"The criterion {self.criterion!r} says that this profile was measured, but "
                    f"it has no `{name}`."
                )
        if not self.sample_count:
            raise ProfileError(
                f"The criterion {self.criterion!r} and 0 samples contradict each other: a profile "
                "that does not come from data is 'uniform' or 'by_hand'."
            )
        if (self.end_to_end is None) != (self.held_out_count == 0):
            raise ProfileError(
                f"`end_to_end` and {self.held_out_count} held-out samples contradict each other: "
                "it is what was measured on them."
            )
        wanted = MEASURED_STATISTICS + (DAMAGE_STATISTICS if self.refinement is not None else ())
        if set(self.statistics) != set(wanted):
            missing = sorted(set(wanted) - set(self.statistics))
            unknown = sorted(set(self.statistics) - set(wanted))
            raise ProfileError(
                "`statistics` of a measured profile are "
                f"{', '.join(wanted)}; missing: {', '.join(missing) or 'none'}; "
                f"unknown: {', '.join(unknown) or 'none'}."
            )
        statistics = {name: np.asarray(values) for name, values in self.statistics.items()}
        negative = [name for name, values in statistics.items() if np.any(values < 0)]
        if negative:
            raise ProfileError(f"`statistics[{negative[0]!r}]` holds numbers below 0.")
        mass = sum(statistics[f"mass_{group.name}"] for group in KeyGroup)
        if np.any(np.abs(mass - 1) > _MASS_TOLERANCE):
            raise ProfileError("`statistics`: the attention masses of a head must add up to 1.")
        self._check_flops(self.attention_flops or {})
        if self.criterion == "output_error" and self.refinement is None:
            self._check_threshold(statistics)

    def _check_flops(self, flops: Mapping[str, int | float]) -> None:
        if set(flops) != {"dense", "sparse", "reduction"}:
            raise ProfileError("`attention_flops` must have dense, sparse and reduction.")
        dense, sparse = flops["dense"], flops["sparse"]
        if not 0 < sparse <= dense or abs(1 - sparse / dense - flops["reduction"]) > 1e-9:
            raise ProfileError(
                f"`attention_flops`: {sparse} of {dense} FLOPs are no reduction by "
                f"{flops['reduction']}."
            )
        kinds = self.attention_flops_per_kind
        sums = tuple(
            sum(getattr(kind, name) for kind in kinds) for name in ("dense", "sparse", "layers")
        )
        if kinds and sums != (dense, sparse, self.layers):
            raise ProfileError(
                f"`attention_flops_per_kind` adds up to {sums[0]} dense and {sums[1]} sparse FLOPs "
                f"in {sums[2]} layers, the model's {self.layers} have {dense} and {sparse}."
            )

    def _check_threshold(self, statistics: Mapping[str, np.ndarray]) -> None:
        if "threshold" not in self.thresholds:
            raise ProfileError("`thresholds` of the criterion 'output_error' lack `threshold`.")
        for category in HeadCategory:
            if category is HeadCategory.DENSE:
                continue
            error = statistics[f"error_{category.name}"]
            wrong = (self.categories == category) & (error > self.thresholds["threshold"])
            if wrong.any():
                layer, head = np.argwhere(wrong)[0].tolist()
                raise ProfileError(
                    f"Head {head} of layer {layer} is {category.name} with an error of "
                    f"{error[layer, head]:.4g}, above the threshold of "
                    f"{self.thresholds['threshold']:.4g}: these categories do not come from these "
                    "statistics."
                )

    @property
    def layers(self) -> int:
        """Number of language-model layers."""
        return self.categories.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads of each layer."""
        return self.categories.shape[1]

    @property
    def from_data(self) -> bool:
        """Whether the categories were measured; False for those set by hand."""
        return self.criterion in MEASURED_CRITERIA

    @classmethod
    def uniform(
        cls,
        category: HeadCategory | str,
        model: Any = None,
        *,
        family: str | None = None,
        layers: int | None = None,
        heads: int | None = None,
        sinks: Sinks | None = None,
    ) -> "Profile":
        """One category for all heads, for experiments; the file says that it comes from no data.

        Args:
          category: a `HeadCategory` or its name.
          model: what `bsjax.load` returns; gives family and counts.
          family: `model_type` of the configuration, when there is no model.
          layers: number of language-model layers, when there is no model.
          heads: number of query heads of each layer, when there is no model.
          sinks: sink tokens; the first token of every image when None.

        Raises:
          ProfileError: an unknown category, or neither a model nor all three of family, layers,
            heads.
        """
        try:
            category = HeadCategory.parse(category)
        except ValueError as error:
            raise ProfileError(str(error)) from None
        fingerprint = None
        if model is not None:
            if not (family is None and layers is None and heads is None):
                raise ProfileError("Give a model, or family, layers and heads; not both.")
            (family, layers, heads), fingerprint = _shape_of(model), model.fingerprint
        if family is None or layers is None or heads is None:
            raise ProfileError(
                f"Profile.uniform needs a model, or family, layers and heads; got "
                f"family={family!r}, layers={layers!r}, heads={heads!r}."
            )
        layers = whole_number("layers", layers, least=1, error=ProfileError)
        heads = whole_number("heads", heads, least=1, error=ProfileError)
        return cls(
            family=family,
            categories=np.full((layers, heads), int(category), np.int8),
            sinks=Sinks() if sinks is None else sinks,
            fingerprint=fingerprint,
            criterion="uniform",
            sample_source=(
                f"none: {category.name} was set for all heads by hand, for experiments; "
                "this profile does not come from data"
            ),
            versions=installed_versions(),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Reads a profile file.

        Raises:
          ProfileError: there is no such file, or it is not a profile of format version 1; the
            message names the field and what is wrong with it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, TypeError, UnicodeDecodeError) as error:
            raise ProfileError(f"The profile {path} cannot be read: {error}") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, name: str = "profile") -> "Profile":
        """Reads a profile from the text of its file; `name` is what error messages call it.

        Raises:
          ProfileError: see `load`.
        """
        try:
            return cls(**profile_format.parse(text))
        except (ProfileError, TemplateError) as error:
            raise ProfileError(f"{name}: {error}") from error

    def to_json(self) -> str:
        """The text of the profile's file."""
        document = {
            "format": profile_format.FORMAT,
            "format_version": profile_format.FORMAT_VERSION,
            "family": self.family,
            "checkpoint_fingerprint": self.fingerprint,
            "layers": self.layers,
            "heads": self.heads,
            "sinks": {"first": self.sinks.first, "offsets": list(self.sinks.offsets)},
            "from_data": self.from_data,
            "criterion": self.criterion,
            "thresholds": dict(self.thresholds),
            "samples": {
                "count": self.sample_count,
                "held_out": self.held_out_count,
                "source": self.sample_source,
                "fingerprint": self.sample_fingerprint,
            },
            "attention_flops": _object_or_null(self.attention_flops),
            "attention_flops_per_kind": [
                {
                    **asdict(kind.visibility),
                    "layers": kind.layers,
                    "dense": kind.dense,
                    "sparse": kind.sparse,
                }
                for kind in self.attention_flops_per_kind
            ],
            "category_letters": profile_format.LEGEND,
            "categories": [
                "".join(_LETTER_OF[HeadCategory(value)] for value in row) for row in self.categories
            ],
            "sink_discovery": None
            if self.sink_discovery is None
            else {
                "rule": self.sink_discovery["rule"],
                "mass_by_offset": list(self.sink_discovery["mass_by_offset"]),
            },
            "statistics": {
                name: np.asarray(values, np.float64).tolist()
                for name, values in self.statistics.items()
            },
            "refinement": _object_or_null(self.refinement),
            "end_to_end": _object_or_null(self.end_to_end),
            "versions": dict(self.versions),
        }
        return profile_format.render(document) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile's file, whole or not at all.

        Raises:
          ProfileError: the file cannot be written there.
        """
        path = Path(path)
        text = self.to_json()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:  # Interrupts leave nothing behind either.
            temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise ProfileError(f"The profile cannot be written to {path}: {error}") from error

    def check(self, family: str, layers: int, heads: int, fingerprint: str | None = None) -> None:
        """Refuses a model that the profile was not made for.

        Raises:
          ProfileError: another family, another number of layers or heads, or another checkpoint
            when the profile names one.
        """
        if family != self.family:
            raise ProfileError(
                f"This profile is for {self.family}, the model is {family}: use a profile made for "
                "this checkpoint."
            )
        if (layers, heads) != (self.layers, self.heads):
            raise ProfileError(
                f"This profile has {self.layers} layers of {self.heads} heads, the model has "
                f"{layers} layers of {heads}: use a profile made for this checkpoint."
            )
        if self.fingerprint is not None and fingerprint is not None:
            if fingerprint != self.fingerprint:
                raise ProfileError(
                    "This profile was made for the checkpoint with fingerprint "
                    f"{self.fingerprint}, the model's is {fingerprint}: the weights differ. Use a "
                    "profile made for this checkpoint."
                )

    @classmethod
    def resolve(
        cls, profile: "Profile | str | os.PathLike[str] | None", model: Any
    ) -> "Profile | None":
        """What `profile=` means anywhere in the API, checked against `model`.

        Args:
          profile: None (dense), a `Profile`, the path of a file, or the name of a shipped profile.
          model: what `bsjax.load` returns.

        Raises:
          ProfileError: no such file or name, or the profile does not fit the model.
        """
        if profile is None:
            return None
        if (
            isinstance(profile, str)
            and not Path(profile).is_file()
            and not _looks_like_path(profile)
        ):
            profile = shipped(profile)
        elif isinstance(profile, str | os.PathLike):
            profile = cls.load(profile)
        elif not isinstance(profile, Profile):
            raise ProfileError(
                "A profile is None, a path, a name or a bsjax.Profile, got "
                f"{type(profile).__name__}."
            )
        profile.check(*_shape_of(model), model.fingerprint)
        return profile


def _numbers(name: str, values: Mapping[str, Any]) -> dict[str, int | float]:
    """Python's numbers, finite ones, by name."""
    numbers = {}
    for key, value in values.items():
        try:
            number = value if type(value) in (int, float) else float(value)
            finite = math.isfinite(number)
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            raise ProfileError(f"`{name}[{key!r}]` must be a finite number, got {value!r}.")
        numbers[key] = number
    return numbers


def _object_or_null(values: Mapping[str, int | float] | None) -> dict[str, int | float] | None:
    return None if values is None else dict(values)


def _shape_of(model: Any) -> tuple[str, int, int]:
    text_config = model.config.get_text_config()
    return model.family.name, text_config.num_hidden_layers, text_config.num_attention_heads


def _looks_like_path(text: str) -> bool:
    return text.endswith(".json") or os.sep in text or "/" in text


def shipped_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    return tuple(sorted(file.stem for file in _shipped_folder().glob("*.json")))


def shipped(name: str) -> Profile:
    """The profile of that name that comes with the package.

    Raises:
      ProfileError: there is no such profile; the message lists those there are.
    """
    names = shipped_names()
    if name not in names:
        listed = (
            f"shipped profiles are {', '.join(names)}" if names else "no profile is shipped yet"
        )
        raise ProfileError(f"There is no file and no shipped profile named {name!r}: {listed}.")
    text = (_shipped_folder() / f"{name}.json").read_text(encoding="utf-8")
    return Profile.from_json(text, f"shipped profile {name}")


def _shipped_folder() -> Path:
    """`profiles/` of the repository, which a wheel holds as `bsjax/profiles/shipped`."""
    here = Path(__file__).parent
    installed = here / "shipped"
    return installed if installed.is_dir() else here.parents[1] / "profiles"


def installed_versions() -> dict[str, str]:
    """Versions of what makes a profile, by package."""
    versions = {}
    for package in ("bsjax", "jax", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Used from a source folder that was not installed.
            versions[package] = "not installed"
    return versions
