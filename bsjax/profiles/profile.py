"""`Profile`: the category of every query head of one checkpoint, and the evidence for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8

from bsjax.checks import not_a_model, shown, whole_number
from bsjax.errors import ProfileError, TemplateError
from bsjax.files import read_text
from bsjax.masks.categories import HeadCategory
from bsjax.masks.template import Sinks
from bsjax.profiles import format as profile_format
from bsjax.profiles.evidence import Evidence
from bsjax.unfinished import write_text


@dataclass(frozen=True, eq=False)
class Profile:
    """A category for every query head of every language-model layer of one checkpoint.

    Attributes:
      family: `model_type` of the checkpoint's configuration, such as "qwen2_5_vl".
      categories: int8 [layers, heads], `HeadCategory` values; read-only.
      sinks: which tokens of an image are sinks.
      fingerprint: the checkpoint's fingerprint. With None, the profile fits any checkpoint of this
        family with these numbers of layers and heads.
      evidence: what the categories were chosen from; None for categories set by hand.
      is_uniform: whether the categories were set by hand to the same one for all heads.
      source: where the categories come from, in words: the source of the samples, or how they were
        set by hand.
      versions: versions of the packages that made the profile, by name; for a measured profile
        also the `dtype` and the attention `backend` that it was measured with.

    Raises:
      ProfileError: a value is out of range, or the evidence does not fit the categories.
    """

    family: str
    categories: Int8[np.ndarray, "layers heads"]
    sinks: Sinks = field(default_factory=Sinks)
    fingerprint: str | None = None
    evidence: Evidence | None = None
    source: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    is_uniform: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or not self.family:
            raise ProfileError(
                f"`family` must be a model type such as 'qwen2_vl', got {shown(self.family)}."
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
        if self.is_uniform and (self.from_data or np.any(categories != categories[0, 0])):
            raise ProfileError(
                "The criterion 'uniform' is for the same category in all heads, set by hand; use "
                "'by_hand' for other categories that do not come from data."
            )
        if self.fingerprint == "":
            raise ProfileError("`fingerprint` must be None or the checkpoint's, not an empty text.")
        if self.evidence is not None:
            if self.fingerprint is None:
                raise ProfileError("A measured profile needs the `fingerprint` of its checkpoint.")
            self.evidence.check_categories(categories)

    @property
    def layers(self) -> int:
        """Number of language-model layers."""
        return self.categories.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads of each layer."""
        return self.categories.shape[1]

    @property
    def is_sparse(self) -> bool:
        """Whether any head is sparse."""
        return bool((self.categories != HeadCategory.DENSE).any())

    @property
    def from_data(self) -> bool:
        """Whether the categories were measured; False for those set by hand."""
        return self.evidence is not None

    @property
    def criterion(self) -> str:
        """How the categories were chosen: one of `bsjax.profiles.criteria.CRITERIA`."""
        if self.evidence is not None:
            return self.evidence.criterion
        return "uniform" if self.is_uniform else "by_hand"

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
        """The same category for all heads, for experiments. Its file says that it is not from data.

        Args:
          category: a `HeadCategory` or its name.
          model: from `bsjax.load`; family and counts are taken from it.
          family: `model_type` of the configuration, without a model.
          layers: number of language-model layers, without a model.
          heads: number of query heads of each layer, without a model.
          sinks: sink tokens; None means the first token of every image.

        Raises:
          ProfileError: the category is unknown, or there is neither a model nor all three of
            family, layers and heads.
        """
        try:
            category = HeadCategory.parse(category)
        except ValueError as error:
            raise ProfileError(str(error)) from None
        fingerprint = None
        if model is not None:
            if not (family is None and layers is None and heads is None):
                raise ProfileError("Give a model, or family, layers and heads; not both.")
            family, layers, heads, fingerprint = _identity_of(model)
        if family is None or layers is None or heads is None:
            raise ProfileError(
                f"Profile.uniform needs a model, or family, layers and heads; got "
                f"family={shown(family)}, layers={shown(layers)}, heads={shown(heads)}."
            )
        layers = whole_number("layers", layers, least=1, error=ProfileError)
        heads = whole_number("heads", heads, least=1, error=ProfileError)
        return cls(
            family=family,
            categories=np.full((layers, heads), int(category), np.int8),
            sinks=Sinks() if sinks is None else sinks,
            fingerprint=fingerprint,
            source=(
                f"none: {category.name} was set for all heads by hand, for experiments; "
                "this profile does not come from data"
            ),
            versions=installed_versions(),
            is_uniform=True,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Reads a profile file.

        Raises:
          ProfileError: there is no such file, or it is not a profile of format version 1; the
            message names the field and what is wrong with it.
        """
        text = read_text(path, error=ProfileError)
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, name: str = "profile") -> "Profile":
        """Reads a profile from the text of its file. Error messages call the profile `name`.

        Raises:
          ProfileError: see `load`.
        """
        try:
            return cls(**profile_format.parse(text))
        except (ProfileError, TemplateError) as error:
            raise ProfileError(f"{name}: {error}") from error

    def to_json(self) -> str:
        """The text of the profile's file."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return profile_format.write(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile's file. An interrupted write leaves any earlier file as it was.

        Raises:
          ProfileError: the file cannot be written there.
        """
        path = Path(path)
        text = self.to_json()
        try:
            write_text(path, text)
        except OSError as error:
            raise ProfileError(f"The profile cannot be written to {path}: {error}") from error

    def check(self, family: str, layers: int, heads: int, fingerprint: str | None = None) -> None:
        """Rejects a model that the profile was not made for.

        Raises:
          ProfileError: the model has another family, other numbers of layers or heads, or another
            fingerprint than the profile.
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
        """Resolves a `profile=` argument of the API, and checks that the profile fits `model`.

        Args:
          profile: None (dense), a `Profile`, the path of a file, or the name of a shipped profile.
          model: from `bsjax.load`.

        Raises:
          ProfileError: there is no such file or name, or the profile does not fit the model.
        """
        identity = _identity_of(model)
        if profile is None:
            return None
        if (
            isinstance(profile, str)
            and not os.path.isfile(profile)
            and not _looks_like_path(profile)
        ):
            profile = shipped(profile)
        elif isinstance(profile, str | os.PathLike):
            profile = cls.load(profile)
        elif not isinstance(profile, Profile):
            raise ProfileError(
                "A profile must be None, a path, a name or a bsjax.Profile, got "
                f"{type(profile).__name__}."
            )
        profile.check(*identity)
        return profile


def _identity_of(model: Any) -> tuple[str, int, int, str]:
    """What a profile is made for: a family, numbers of layers and heads, and weights.

    A model has all of this before its weights are read.

    Raises:
      ProfileError: it is not a model.
    """
    try:
        family, fingerprint = model.family.name, model.fingerprint
        text_config = model.config.get_text_config()
    except AttributeError:
        raise ProfileError(not_a_model(model)) from None
    return family, text_config.num_hidden_layers, text_config.num_attention_heads, fingerprint


def _looks_like_path(text: str) -> bool:
    return text.endswith(".json") or os.sep in text or "/" in text


def shipped_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    return tuple(sorted(file.stem for file in shipped_folder().glob("*.json")))


def shipped(name: str) -> Profile:
    """The profile of that name that comes with the package.

    Raises:
      ProfileError: there is no such profile; the message lists the names.
    """
    names = shipped_names()
    if name not in names:
        listed = (
            f"shipped profiles are {', '.join(names)}" if names else "no profile is shipped yet"
        )
        raise ProfileError(f"There is no file and no shipped profile named {name!r}: {listed}.")
    return Profile.load(shipped_folder() / f"{name}.json")


def shipped_folder() -> Path:
    """`profiles/` of the repository, which a wheel holds as `bsjax/profiles/shipped`."""
    here = Path(__file__).parent
    installed = here / "shipped"
    return installed if installed.is_dir() else here.parents[1] / "profiles"


def installed_versions() -> dict[str, str]:
    """The installed versions of bsjax and the packages that profiling depends on."""
    versions = {}
    for package in ("bsjax", "jax", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # bsjax may be used from a source folder.
            versions[package] = "not installed"
    return versions
