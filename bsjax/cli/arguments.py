"""Arguments that several subcommands share."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsjax.errors import BsjaxError
from bsjax.masks.categories import HeadCategory

if TYPE_CHECKING:
    from bsjax.checkpoint.loading import DescribedModel, WeightsReader
    from bsjax.profiles.profile import Profile
    from bsjax.prompts.sources import ImageSources

CATEGORY_NAMES = ", ".join(category.name.lower() for category in HeadCategory)


def add_images(parser: argparse.ArgumentParser, *, only_options: bool = False) -> None:
    """Adds the arguments for a question's images and how to read them."""
    if only_options:
        parser.set_defaults(images=[])
        text = "a path or URL; once for each image, in order"
    else:
        parser.add_argument("images", metavar="IMAGE", nargs="*", help="paths or URLs, in order")
        text = "another image, after IMAGE ..."
    parser.add_argument("--image", action="append", default=[], metavar="IMAGE", help=text)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_image_settings(parser)


def add_image_settings(parser: Any) -> None:
    """Adds the options for reading images; `parser` is a parser or an argument group."""
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="scale larger images down to N pixels (Qwen)"
    )
    parser.add_argument(
        "--pan-and-scan", action="store_true", help="add crops of long images (Gemma 3)"
    )
    parser.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="download images from this machine and its own network too",
    )


def add_profiles(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the categories of heads."""
    profiles = parser.add_mutually_exclusive_group()
    profiles.add_argument(
        "--profile",
        metavar="FILE",
        help="a profile file, or the name of a shipped profile; default: dense attention",
    )
    profiles.add_argument(
        "--uniform",
        metavar="CATEGORY",
        type=category,
        help=f"for experiments: the same category in all heads ({CATEGORY_NAMES})",
    )


def profile_of(options: argparse.Namespace, model: "DescribedModel") -> "Profile | None":
    """The profile, by the arguments of `add_profiles`."""
    from bsjax.profiles.profile import Profile

    if options.uniform is not None:
        return Profile.uniform(options.uniform, model)
    return Profile.resolve(options.profile, model)


def add_device_options(parser: Any) -> None:
    """Adds the options for how a model runs; `parser` is a parser or an argument group."""
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: by device")
    parser.add_argument(
        "--backend",
        default="auto",
        help="attention backend: auto, pallas, triton, xla or reference",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="divide the weights among N devices (default 1)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1,
        metavar="N",
        help="divide the rows of prompts among N devices, or groups of them (default 1)",
    )


def image_sources_of(options: argparse.Namespace) -> "ImageSources":
    """Where images may come from, by the arguments of `add_image_settings`."""
    from bsjax.prompts.sources import ImageSources

    return ImageSources(allow_private_addresses=options.allow_private_addresses)


def described_model(
    options: argparse.Namespace, reader: "WeightsReader | None" = None
) -> "DescribedModel":
    """The checkpoint of a command without its weights, by the arguments of `add_device_options`.

    Reading weights takes long. A command first checks all that it was given against this model.

    Args:
      options: the options of the command.
      reader: reads the weights meanwhile.
    """
    from bsjax.checkpoint.loading import describe
    from bsjax.models.sharding import mesh
    from bsjax.prompts.sources import DEFAULT_SOURCES

    sizes = options.tensor, options.context
    reads_images = hasattr(options, "allow_private_addresses")
    sources = image_sources_of(options) if reads_images else DEFAULT_SOURCES
    return describe(
        options.checkpoint,
        options.dtype,
        mesh=None if sizes == (1, 1) else mesh(*sizes),
        image_sources=sources,
        reader=reader,
    )


def with_profile(described: "DescribedModel", profile: "Profile | None") -> "DescribedModel":
    """The model, before its weights are read, with its heads dealt to devices by a profile."""
    from bsjax.checkpoint.loading import with_heads_dealt

    return with_heads_dealt(described, None if profile is None else profile.categories)


def names_of(options: argparse.Namespace) -> dict[str, str]:
    """How a command's error messages name arguments of Python: as the options that set them."""
    names = {name: f"--{name.replace('_', '-')}" for name in vars(options)}
    return names | {"do_pan_and_scan": "--pan-and-scan"}


def image_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of image parts, by the arguments of `add_image_settings`."""
    return {
        "max_pixels": options.max_pixels,
        "do_pan_and_scan": options.pan_and_scan or None,
    }


def messages_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The conversation described by the arguments of `add_images` and the question."""
    content = [image_part(image, options) for image in (*options.images, *options.image)]
    content.append({"type": "text", "text": options.question})
    messages = [{"role": "user", "content": content}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return messages


def image_part(image: str, options: argparse.Namespace) -> dict[str, Any]:
    """An image as a part of a message, with the arguments of `add_image_settings`."""
    return {"type": "image", "image": image, **image_options(options)}


def category(text: str) -> HeadCategory:
    """Parses the name of a head category."""
    try:
        return HeadCategory.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {CATEGORY_NAMES}") from None


def check_writable(path: Path, *, error: type[BsjaxError]) -> None:
    """Rejects an `--output` that cannot be written, before hours of work rather than after.

    Args:
      path: the file, which need not exist.
      error: raised if it is not an ordinary file, or its folder does not let one be made.
    """
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise error(f"--output {path} is a folder: name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise error(f"--output {path} is not an ordinary file: name another one.")
    if not os.path.isdir(folder):
        raise error(f"--output {path}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK):
        raise error(f"--output {path}: the folder {folder} cannot be written to.")
