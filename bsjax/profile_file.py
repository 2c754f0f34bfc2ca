"""Profiles: which category every query head of one checkpoint has, and the JSON file that says so.

The file is for people as much as for programs: one row of letters per layer, one letter per head,
and beside it what was measured, on what, and how far the sparse model is from the dense one.
Reading is strict, because a profile that does not fit its model gives wrong answers without any
other sign.
"""

import importlib.resources
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8

from bsjax import profile_format
from bsjax.categories import HeadCategory
from bsjax.checks import whole_number
from bsjax.errors import ProfileError, TemplateError
from bsjax.template import Sinks

CRITERIA = ("output_error", "mass", "uniform")
"""How categories were chosen. "uniform" means: not from data, one category for all heads."""

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
    criterion: str = "uniform"
    """One of `CRITERIA`."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """The numbers the criterion was used with, by name."""
    sample_count: int = 0
    sample_source: str = ""
    """Where the samples came from, in words."""
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What was measured for each head, by name: float64 [layers, heads] each."""
    end_to_end: Mapping[str, float] | None = None
    """Sparse against dense answers on held-out samples, by name; None when not measured."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of what made the profile, by package."""

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
        if self.from_data != (self.sample_count > 0):
            raise ProfileError(
                f"The criterion {self.criterion!r} and {self.sample_count} samples contradict each "
                "other: only a uniform profile has no samples."
            )
        whole_number("`sample_count`", self.sample_count, least=0, error=ProfileError)
        if not isinstance(self.sinks, Sinks):
            raise ProfileError(f"`sinks` must be bsjax.Sinks, got {self.sinks!r}.")
        # Measurements come as NumPy's and JAX's numbers; the file holds Python's.
        object.__setattr__(self, "thresholds", _numbers("thresholds", self.thresholds))
        if self.end_to_end is not None:
            object.__setattr__(self, "end_to_end", _numbers("end_to_end", self.end_to_end))
        for name, values in self.statistics.items():
            if not np.isfinite(np.asarray(values, np.float64)).all():
                raise ProfileError(f"`statistics[{name!r}]` holds numbers that are not finite.")
            if np.shape(values) != categories.shape:
                raise ProfileError(
                    f"`statistics[{name!r}]` has the shape {np.shape(values)}: it must have one "
                    f"number per layer and head, {categories.shape}."
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
        """Whether the categories were measured; False for a uniform profile."""
        return self.criterion != "uniform"

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
            versions=_installed_versions(),
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
            "samples": {"count": self.sample_count, "source": self.sample_source},
            "category_letters": profile_format.LEGEND,
            "categories": [
                "".join(_LETTER_OF[HeadCategory(value)] for value in row) for row in self.categories
            ],
            "statistics": {
                name: np.asarray(values, np.float64).tolist()
                for name, values in self.statistics.items()
            },
            "end_to_end": None if self.end_to_end is None else dict(self.end_to_end),
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
        except OSError as error:
            temporary.unlink(missing_ok=True)
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
            profile = _shipped(profile)
        elif isinstance(profile, str | os.PathLike):
            profile = cls.load(profile)
        elif not isinstance(profile, Profile):
            raise ProfileError(
                "A profile is None, a path, a name or a bsjax.Profile, got "
                f"{type(profile).__name__}."
            )
        profile.check(*_shape_of(model), model.fingerprint)
        return profile


def _numbers(name: str, values: Mapping[str, Any]) -> dict[str, float]:
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


def _shape_of(model: Any) -> tuple[str, int, int]:
    text_config = model.config.get_text_config()
    return model.family.name, text_config.num_hidden_layers, text_config.num_attention_heads


def _looks_like_path(text: str) -> bool:
    return text.endswith(".json") or os.sep in text or "/" in text


def shipped_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    files = importlib.resources.files("profiles").iterdir()
    return tuple(sorted(file.name[:-5] for file in files if file.name.endswith(".json")))


def _shipped(name: str) -> Profile:
    names = shipped_names()
    if name not in names:
        listed = (
            f"shipped profiles are {', '.join(names)}" if names else "no profile is shipped yet"
        )
        raise ProfileError(f"There is no file and no shipped profile named {name!r}: {listed}.")
    file = importlib.resources.files("profiles") / f"{name}.json"
    return Profile.from_json(file.read_text(encoding="utf-8"), f"shipped profile {name}")


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in ("bsjax", "jax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Used from a source folder that was not installed.
            versions[package] = "not installed"
    return versions
