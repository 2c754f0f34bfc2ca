"""Pixels in bytes: what of an image is computed on the host, and what in the vision program.

    on the host       scale the image (uint8), cut it into patches        3 bytes a pixel
    on the device     rescale, normalise, embed the patches               float32

A still image is two equal frames for Qwen's towers. Their product with the patch embedding is one
product with the sum of the kernel's two halves, so that each frame is stored and multiplied once.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float32, Float64, Int, UInt8
from PIL.Image import Resampling
from transformers.image_transforms import resize
from transformers.image_utils import ChannelDimension

from bsjax.errors import CheckpointError, MessageError

_VALUES = 256
_FIRST = ChannelDimension.FIRST


class PixelScale(NamedTuple):
    """What an image processor computes of the values 0 to 255 of each channel.

    `value * factor + offset` is what its `rescale` and `normalize` make of a value, to float32
    rounding.
    """

    factor: Any
    """float32 [channels]."""
    offset: Any
    """float32 [channels]."""


class Pixels(NamedTuple):
    """Patches of still images. A pytree: the input of a vision tower."""

    values: Any
    """uint8 [patches, area * channels]: each patch's pixels row by row, the channels of a pixel
    together."""
    scale: PixelScale
    """What the values mean."""


def pixel_scale(image_processor: Any, channels: int) -> PixelScale:
    """The scale of a checkpoint's image processor, found by giving it all values.

    Args:
      image_processor: a PIL image processor of transformers.
      channels: channels of its images.

    Raises:
      CheckpointError: a setting is missing, or does not fit the number of channels.
    """
    try:
        if image_processor.do_resize and image_processor.resample is not None:
            Resampling(image_processor.resample)
        line = _values(image_processor, channels)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint's image settings (preprocessor_config.json) cannot be used: {error}"
        ) from error
    factor = (line[:, -1] - line[:, 0]) / (_VALUES - 1)
    if not np.isfinite(factor).all() or not np.isfinite(line).all():
        raise CheckpointError(
            "The checkpoint's image settings (preprocessor_config.json) make values of pixels that "
            "are not finite: look at rescale_factor, image_mean and image_std."
        )
    return PixelScale(factor.astype(np.float32), line[:, 0].astype(np.float32))


def _values(image_processor: Any, channels: int) -> Float64[np.ndarray, "channels values"]:
    """What an image processor makes of the values 0 to 255 of each channel."""
    values: np.ndarray = np.broadcast_to(np.arange(_VALUES, dtype=np.uint8), (channels, 1, _VALUES))
    if image_processor.do_rescale:
        values = image_processor.rescale(values, image_processor.rescale_factor)
    if image_processor.do_normalize:
        values = image_processor.normalize(
            values, image_processor.image_mean, image_processor.image_std
        )
    return np.asarray(values, np.float64)[:, 0]


def image_size(image: PIL.Image.Image | np.ndarray) -> tuple[int, int]:
    """Height and width of a PIL image, or of an array with its channels first."""
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    return image.shape[1], image.shape[2]


def scaled_to(
    image: PIL.Image.Image | np.ndarray,
    size: tuple[int, int] | None,
    image_processor: Any,
    *,
    channels: int,
    convert_rgb: bool,
) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of an image, scaled as transformers' image processors scale it (`resize`).

    Args:
      image: a PIL image, or an array with its channels first and whole values from 0 to 255.
      size: height and width; None leaves the image as it is.
      image_processor: the checkpoint's image processor.
      channels: how many channels the vision tower reads.
      convert_rgb: whether images of other modes are converted to RGB.

    Raises:
      MessageError: the image has another number of channels, or the settings lack the filter.
    """
    if size is not None and image_processor.resample is None:
        raise MessageError("the checkpoint's image settings do not say how to scale (resample).")
    resample = Resampling(image_processor.resample or 0)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[0] == 3:
        image = PIL.Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
    if (
        isinstance(image, PIL.Image.Image)
        and image.mode == "RGB"
        and image.info.get("transparency") is None
    ):
        # What the processor does for all others, without copies from and to arrays.
        if size is not None:
            height, width = size
            image = image.resize((width, height), resample)
        pixels = np.asarray(image)
    else:
        array = image_processor.process_image(image, do_convert_rgb=convert_rgb)
        if size is not None:
            array = resize(array, size, resample, data_format=_FIRST, input_data_format=_FIRST)
        pixels = np.moveaxis(array.astype(np.uint8), 0, -1)
    if pixels.shape[-1] != channels:
        raise MessageError(
            f"it has {pixels.shape[-1]} channels, and the model reads {channels}: the checkpoint's "
            "image settings do not convert images to RGB (do_convert_rgb)."
        )
    return pixels


def cut_into_patches(
    pixels: UInt8[np.ndarray, "height width channels"],
    patch_size: int,
    merge: int,
    place: UInt8[np.ndarray, "_ _"] | None = None,
) -> UInt8[np.ndarray, "patches values"]:
    """Patches of an image, those that are merged into one image token one after the other.

    Args:
      pixels: the scaled image; its sides are multiples of `patch_size * merge`.
      patch_size: pixels along each side of a patch.
      merge: patches along each side of an image token.
      place: a contiguous array that is written to and returned, if it has the shape of the patches.
    """
    height, width, channels = pixels.shape
    down, across = (side // (patch_size * merge) for side in (height, width))
    shape = down * across * merge**2, patch_size**2 * channels
    patches = place if place is not None and place.shape == shape else np.empty(shape, np.uint8)
    cut = pixels.reshape(down, merge, patch_size, across, merge, patch_size * channels)
    cut = cut.transpose(0, 3, 1, 4, 2, 5)
    patches.reshape(cut.shape)[:] = cut
    return patches


def in_order(
    pixels: Pixels | Float[Array, "patches values"], order: Int[Array, "patches"]
) -> Pixels | Float[Array, "patches values"]:
    """The patches in another order."""
    if isinstance(pixels, Pixels):
        return pixels._replace(values=pixels.values[order])
    return pixels[order]


def embedded(
    pixels: Pixels | Float[Array, "patches values"],
    kernel: Float[Array, "values width"],
    *,
    frames: int = 1,
) -> Float[Array, "patches width"]:
    """The product of patches with the kernel of a patch embedding, in the kernel's dtype.

    Args:
      pixels: patches; or what transformers' image processors make of them, with the channels of a
        patch one after the other, and in each of them its frames.
      kernel: the embedding, for values in the latter order.
      frames: how many frames a patch has; those of `Pixels` are equal.
    """
    if not isinstance(pixels, Pixels):
        return pixels.astype(kernel.dtype) @ kernel
    factor, offset = pixels.scale
    channels = factor.size
    values = pixels.values.reshape(pixels.values.shape[0], -1, channels).astype(jnp.float32)
    # transformers rounds pixels to the dtype of the model, too.
    values = (values * factor + offset).astype(kernel.dtype).astype(jnp.float32)
    summed = kernel.astype(jnp.float32).reshape(channels, frames, -1, kernel.shape[1]).sum(axis=1)
    summed = jnp.swapaxes(summed, 0, 1).reshape(-1, kernel.shape[1])
    return (values.reshape(pixels.values.shape) @ summed).astype(kernel.dtype)


def pixel_values_of(
    pixels: Pixels | Float32[np.ndarray, "patches pixel_values"], *, frames: int = 1
) -> Float32[np.ndarray, "patches pixel_values"]:
    """What transformers' image processors make of patches, on the host: float32, every frame."""
    if not isinstance(pixels, Pixels):
        return np.array(pixels, np.float32)
    factor, offset = (np.asarray(array, np.float32) for array in pixels.scale)
    values = np.asarray(pixels.values).reshape(len(pixels.values), -1, factor.size)
    normalized = np.swapaxes(values * factor + offset, 1, 2)
    repeated = np.repeat(normalized[:, :, None], frames, axis=2)
    return np.ascontiguousarray(repeated.reshape(len(values), -1), np.float32)
