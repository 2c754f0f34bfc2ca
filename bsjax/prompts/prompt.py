"""Turns chat messages into what a model reads: token ids, pixel values and tokens per image.

Chat template, tokenizer and image processor are the checkpoint's own, from transformers; none of
them needs torch. `Processor` and the model's `Family` do what Hugging Face's processors add: the
chat template writes one placeholder per image, the family expands it, and image tokens are repeated
until each image has all of its tokens.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int32, Int64, UInt8
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bsjax.checks import argument, is_failure, truth_value, whole_number
from bsjax.errors import MessageError
from bsjax.models.family import Family, ImageShapes
from bsjax.models.pixels import Pixels, PixelScale, image_size, pixel_scale
from bsjax.prompts.image_reader import ImageReader, Requested
from bsjax.prompts.images import (
    check_image,
    read_image,
    shortened,
    shown_source,
    size_before_reading,
)
from bsjax.prompts.known_images import ContentDigests, ImageContent, KnownImages
from bsjax.prompts.messages import ImagePart, check_answer, read_messages
from bsjax.prompts.rendering import rendered
from bsjax.prompts.sources import DEFAULT_SOURCES, ImageSources

# Height and width of an image that no option refuses for its size.
_ANY_SIZE = (224, 224)


@dataclass(frozen=True, eq=False)
class PromptImage:
    """An image of a prompt, which may still be being read.

    Attributes:
      grid_thw: how many patches it has along time, height and width.
      tokens: how many image tokens it has.
      scale: what the values of its pixels mean.
      read: returns the patches, and waits for them if need be.
      place: names the array that the patches are to be in. They are written to it, or moved there
        by the next `read` if they are elsewhere.
      begin: begins to read them in another thread, if nothing else does.
      known_digest: the digest, if it is known from an earlier call.
      keep_digest: keeps the digest for later calls.
    """

    grid_thw: Int32[np.ndarray, "3"]
    tokens: int
    scale: PixelScale
    read: Callable[[], UInt8[np.ndarray, "patches values"]]
    place: Callable[[UInt8[np.ndarray, "patches values"]], None] = lambda place: None
    begin: Callable[[], None] = lambda: None
    known_digest: Callable[[], str | None] = lambda: None
    keep_digest: Callable[[str], None] = lambda digest: None

    @property
    def patches(self) -> UInt8[np.ndarray, "patches values"]:
        """The patches, in bytes (`bsjax.models.pixels`).

        Raises:
          MessageError: the image cannot be read.
        """
        return self.read()

    @property
    def size(self) -> int:
        """How many patches it has."""
        return int(self.grid_thw.prod(dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its pixels and of its shape, or what is known in its place.

        Unless it is known, waits for the pixels.
        """
        known = self.known_digest()
        if known is not None:
            return known
        digest = hashlib.sha256(self.grid_thw.astype(np.int64).tobytes())
        digest.update(np.ascontiguousarray(self.patches).data)
        self.keep_digest(digest.hexdigest())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt in prompt order, on the host."""

    token_ids: Int32[np.ndarray, "tokens"]
    """Token ids, with the id of an image token once for every image token."""
    images: tuple[PromptImage, ...] = ()
    """The images; crops are images of their own."""

    @cached_property
    def grid_thw(self) -> Int32[np.ndarray, "images 3"]:
        """Patches of each image along time, height and width."""
        return np.asarray([image.grid_thw for image in self.images], np.int32).reshape(-1, 3)

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Tokens of each image, in prompt order."""
        return tuple(image.tokens for image in self.images)

    @property
    def pixels(self) -> Pixels:
        """The patches of all images, one image after the other. There must be at least one."""
        patches = np.concatenate([image.patches for image in self.images])
        return Pixels(patches, self.images[0].scale)

    def complete(self) -> "Prompt":
        """This prompt, after all images have been read.

        Raises:
          MessageError: an image cannot be read.
        """
        for image in self.images:
            image.begin()
        for image in self.images:
            image.read()
        return self


class _ReadImage(NamedTuple):
    """An image of the messages, cut into patches.

    Attributes:
      shapes: of the image and of its crops.
      patches: the patches of each, which move to other places.
    """

    shapes: ImageShapes
    patches: list[UInt8[np.ndarray, "_ values"]]


class _RequestedImage(NamedTuple):
    """An image of the messages, of which the shapes are known.

    Attributes:
      shapes: of the image and of its crops.
      request: what an `ImageReader` was asked for.
      places: where the patches of the image, whose index is 0, and of its crops are to be.
      name: names the image in errors.
      content: asks for the digest of what it is read from; None where digests are not kept.
    """

    shapes: ImageShapes
    request: Requested[_ReadImage]
    places: dict[int, UInt8[np.ndarray, "_ values"]]
    name: Callable[[], AbstractContextManager[None]]
    content: Requested[str | None] | None

    def patches(self, index: int) -> UInt8[np.ndarray, "patches values"]:
        """The patches of the image, whose index is 0, or of a crop."""
        shapes, patches = self.request.result()
        if not np.array_equal(shapes.grid_thw, self.shapes.grid_thw):
            with self.name():
                raise MessageError("its pixels have another size than its header says.")
        place = self.places.get(index)
        if place is not None and patches[index] is not place:
            place[:] = patches[index]
            patches[index] = place
        return patches[index]

    def image(self, index: int, scale: PixelScale, known: KnownImages | None) -> PromptImage:
        """The image, whose index is 0, or a crop of it."""
        grid_thw, tokens = self.shapes.grid_thw[index], self.shapes.image_tokens[index]
        read, place = partial(self.patches, index), partial(self.places.__setitem__, index)
        content = self.content
        if known is None or content is None:
            return PromptImage(grid_thw, tokens, scale, read, place)
        return PromptImage(
            grid_thw,
            tokens,
            scale,
            read,
            place,
            begin=self.request.start,
            known_digest=lambda: known.get(content.result(), index),
            keep_digest=lambda digest: known.put(content.result(), index, digest),
        )


class AnsweredPrompt(NamedTuple):
    """A prompt that ends with the text of its answer.

    Attributes:
      prompt: the prompt, with the answer.
      first: position of the answer's first token, which is not the first of all.
    """

    prompt: Prompt
    first: int


@dataclass(frozen=True)
class PromptOptions:
    """How the messages of a call become prompts. `Processor.options` checks them."""

    sources: ImageSources = DEFAULT_SOURCES
    """Where images may come from."""
    max_pixels: int | None = None
    """The option `max_pixels` of images that do not have it."""
    continue_final_message: bool = False
    """Whether the answer continues the last message, which is the assistant's."""


@dataclass(frozen=True, eq=False)
class Processor:
    """Makes prompts from messages, like a processor in transformers.

    Attributes:
      config: the Hugging Face configuration.
      family: the family of the config's `model_type`.
      tokenizer: the tokenizer, which holds the chat template.
      image_processor: the image processor, PIL version; None for a model that reads text only.
      image_sources: where images may come from, and limits on them.
    """

    config: PretrainedConfig
    family: Family
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    image_sources: ImageSources = DEFAULT_SOURCES

    @property
    def shares_images(self) -> bool:
        """Whether several processes read the images of one prompt, each some of them."""
        return False

    def prompt(
        self,
        messages: Any,
        *,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
        max_pixels: int | None = None,
        continue_final_message: bool = False,
    ) -> Prompt:
        """Turns one conversation into a prompt that ends where the assistant's answer begins.

        Equals `apply_chat_template(..., add_generation_prompt=True, tokenize=True)` of the family's
        processor in transformers, for text and images; or, to continue the last message,
        `apply_chat_template(..., continue_final_message=True, tokenize=True)`.

        Args:
          messages: a list of dicts with `role` and `content`; `content` is a string, or a list of
            `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. An image is a PIL
            image, an array of 0-255 values (height x width, channels first or last), a path, a URL,
            a data URL or base64. `"url"`, `"path"`, `"base64"` and OpenAI's `{"type": "image_url",
            "image_url": {"url": ...}}` are read as well. An image part may have options: for Qwen,
            `"max_pixels"` and `"min_pixels"` bound the size that the image is scaled to; for Gemma
            3, `"do_pan_and_scan"` adds crops, which are images too (tuned by
            `"pan_and_scan_min_crop_size"`, `"pan_and_scan_max_num_crops"` and
            `"pan_and_scan_min_ratio_to_activate"`). As in transformers, images read from files are
            rotated as their EXIF data says, and PIL images are not.
          allow_files: whether images may be files; None for what `image_sources` says.
          allow_urls: whether images may be downloaded; None for what `image_sources` says.
          max_pixels: the option `max_pixels` of all images that do not have it.
          continue_final_message: whether the prompt ends with the text of the last message, which
            is the assistant's, so that the answer continues it.

        Raises:
          MessageError: there are no messages, a message has an invalid form, an image cannot be
            read, the model reads text only, its images have no `max_pixels`, the last message
            cannot be continued, or the placeholders in the rendered template do not match the
            images. The error says which message or image is wrong, and why.
        """
        options = self.options(allow_files, allow_urls, max_pixels, continue_final_message)
        return self.prompt_of(messages, options)

    def options(
        self,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
        max_pixels: int | None = None,
        continue_final_message: bool = False,
    ) -> PromptOptions:
        """Checks arguments of `prompt`.

        Raises:
          MessageError: an argument is invalid, or the model's images have no `max_pixels`.
        """
        if max_pixels is not None:
            max_pixels = whole_number(
                "max_pixels", max_pixels, least=1, most=2**63 - 1, error=MessageError
            )
            known = self.family.image_options
            if not known:
                raise MessageError(
                    f"{argument('max_pixels')} has no effect: this model reads text only."
                )
            if "max_pixels" not in known:
                raise MessageError(
                    f"Images of {self.family.name} models have no {argument('max_pixels')}. Their "
                    f"options are {', '.join(known)}, in an image's part of the messages."
                )
        return PromptOptions(
            self.image_sources.restricted(allow_files, allow_urls),
            max_pixels,
            truth_value("continue_final_message", continue_final_message, error=MessageError),
        )

    def check(
        self,
        messages: Any,
        options: PromptOptions,
        *,
        answered: bool = False,
        decode: bool = False,
    ) -> None:
        """Finds mistakes in messages in much less time than `prompt` takes.

        Args:
          messages: as for `prompt`.
          options: how they become a prompt.
          answered: whether the last message is the answer to the others, as for `answered_prompt`.
          decode: whether images are decoded, which finds those that are damaged behind their
            headers. They are not scaled, which takes most of the time.

        Raises:
          MessageError: as for `prompt`, except for what only downloading and rendering find out.
        """
        _, images = self._read(messages, options, answered=answered)
        for number, image in enumerate(images, start=1):
            with _naming_image(image, number, len(images)):
                size = check_image(image.key, image.source, options.sources, decode=decode)
                if size is not None:
                    self._shapes(size, image, options.sources)

    def check_image_options(self, options: Mapping[str, Any]) -> None:
        """Checks the options that image parts will have; None is no option.

        Raises:
          MessageError: this model does not have one of them, or its value is invalid.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if given:
            self.family.image_shapes(*_ANY_SIZE, given, self.image_processor, self.config)

    def prompt_of(
        self,
        messages: Any,
        options: PromptOptions,
        reader: ImageReader | None = None,
        known: KnownImages | None = None,
    ) -> Prompt:
        """Like `prompt`, with options that have been checked.

        Args:
          messages: as for `prompt`.
          options: how they become a prompt.
          reader: reads the images after this call, in the order of the prompt. What `prompt` raises
            about an image that cannot be read, `PromptImage.patches` may raise instead. None reads
            them now.
          known: images of earlier calls. With it, and if several processes share the images, they
            are read only when `PromptImage.begin` says so, or when somebody waits for them.
        """
        if reader is None:
            with ImageReader() as reader:
                return self.prompt_of(messages, options, reader).complete()
        known = self._known_images(known)
        template_messages, images = self._read(messages, options)
        text = rendered(
            self.tokenizer,
            template_messages,
            continue_final_message=options.continue_final_message,
        )
        token_ids, requested = self._tokens_and_images(text, images, options.sources, reader, known)
        return self._assembled(token_ids, requested, known)

    def answered_prompt(
        self, messages: Any, options: PromptOptions, reader: ImageReader | None = None
    ) -> AnsweredPrompt:
        """A prompt that ends with the text of its answer, and where the answer begins.

        The whole text is tokenized at once. The answer begins at the first token that the prompt
        without it does not have: where a token holds the last characters of the prompt and the
        first of the answer, that token is the first of the answer.

        Args:
          messages: as for `prompt`; the last one is the answer, and the assistant's.
          options: as for `prompt_of`.
          reader: as for `prompt_of`.

        Raises:
          MessageError: as for `prompt`; or the chat template writes an answer differently from the
            way that it lets one begin, or no token comes before the answer.
        """
        if reader is None:
            with ImageReader() as reader:
                prompt, first = self.answered_prompt(messages, options, reader)
                return AnsweredPrompt(prompt.complete(), first)
        known = self._known_images()
        template_messages, images = self._read(messages, options, answered=True)
        text = rendered(self.tokenizer, template_messages, continue_final_message=True)
        before = rendered(self.tokenizer, template_messages[:-1])
        if not text.startswith(before):
            raise MessageError(
                f"The chat template of {self.tokenizer.name_or_path or 'the tokenizer'} writes an "
                "answer of the assistant differently from the way that it lets one begin, so that "
                "the answer's tokens cannot be told from those of the prompt."
            )
        token_ids, requested = self._tokens_and_images(text, images, options.sources, reader, known)
        ids_before = self._expanded(before, self._tokenize(before), requested)
        shared = min(token_ids.size, ids_before.size)
        differ = np.flatnonzero(token_ids[:shared] != ids_before[:shared])
        first = int(differ[0]) if differ.size else shared
        if not 0 < first < token_ids.size:
            raise MessageError(
                "The tokens of the last message cannot be told from those of the messages before "
                "it: the tokenizer joins them."
            )
        start = int(self._repeats(token_ids, requested)[:first].sum())
        return AnsweredPrompt(self._assembled(token_ids, requested, known), start)

    def _known_images(self, known: KnownImages | None = None) -> KnownImages | None:
        """What tells images apart: `known`, unless processes must agree on it."""
        return ContentDigests() if self.shares_images else known

    def _read(
        self, messages: Any, options: PromptOptions, *, answered: bool = False
    ) -> tuple[list[dict[str, Any]], list[ImagePart]]:
        """What `read_messages` returns, checked against the options and the model."""
        template_messages, images = read_messages(messages)
        if images and self.image_processor is None:
            raise MessageError(
                f"The messages hold {len(images)} image{'s' * (len(images) > 1)}, but this model "
                "reads text only."
            )
        if options.continue_final_message or answered:
            check_answer(template_messages)
        if answered:
            last = len(template_messages) - 1
            if not last:
                raise MessageError(
                    "messages[0] is an answer to nothing: give a user message first."
                )
            content = template_messages[-1]["content"]
            if any(part["type"] == "image" for part in content if isinstance(part, dict)):
                raise MessageError(
                    f"messages[{last}] has an image, but only the text of an answer can be scored."
                )
        if options.max_pixels is not None:
            default = {"max_pixels": options.max_pixels}
            images = [image._replace(options=default | image.options) for image in images]
        return template_messages, images

    def _tokens_and_images(
        self,
        text: str,
        images: Sequence[ImagePart],
        sources: ImageSources,
        reader: ImageReader,
        known: KnownImages | None = None,
    ) -> tuple[Int32[np.ndarray, "expanded"], list[_RequestedImage]]:
        """The token ids of a rendered template, and the images."""
        token_ids = self._tokenize(text)
        self._check_placeholders(token_ids, len(images))
        requested = self._request_images(images, sources, reader, known)
        return self._expanded(text, token_ids, requested), requested

    def _expanded(
        self,
        text: str,
        token_ids: Int32[np.ndarray, "tokens"],
        images: Sequence[_RequestedImage],
    ) -> Int32[np.ndarray, "expanded"]:
        """The token ids of a text, with one token for each image and each crop."""
        if not images:
            return token_ids
        expanded = self.family.expand(
            text, [len(image.shapes.image_tokens) for image in images], self.tokenizer, self.config
        )
        return token_ids if expanded == text else self._tokenize(expanded)

    def _repeats(
        self, token_ids: Int32[np.ndarray, "expanded"], images: Sequence[_RequestedImage]
    ) -> Int64[np.ndarray, "expanded"]:
        """How often each token is in the prompt: an image's as often as the image has tokens."""
        repeats = np.ones(token_ids.size, np.int64)
        if images:
            image_tokens = np.concatenate([image.shapes.image_tokens for image in images])
            repeats[token_ids == self.family.image_token_id(self.config)] = image_tokens
        return repeats

    def _assembled(
        self,
        token_ids: Int32[np.ndarray, "expanded"],
        images: Sequence[_RequestedImage],
        known: KnownImages | None = None,
    ) -> Prompt:
        if not images:
            return Prompt(token_ids)
        return Prompt(
            np.repeat(token_ids, self._repeats(token_ids, images)),
            tuple(
                image.image(index, self.pixel_scale, known)
                for image in images
                for index in range(len(image.shapes.image_tokens))
            ),
        )

    @cached_property
    def pixel_scale(self) -> PixelScale:
        """What the values of images' pixels mean; the model must read images."""
        self.family.check_image_settings(self.image_processor, self.config)
        return pixel_scale(self.image_processor, self.family.channels(self.config))

    def _tokenize(self, text: str) -> Int32[np.ndarray, "tokens"]:
        # `verbose` would warn of long prompts, whose length is checked later with a better message.
        name = f"The tokenizer of {self.tokenizer.name_or_path}"
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
            token_ids = np.asarray(encoded["input_ids"], np.int32)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise MessageError(f"{name} cannot read these messages: {error}") from error
        if not token_ids.size:
            raise MessageError(f"{name} makes no tokens of these messages.")
        return token_ids

    def _check_placeholders(self, token_ids: Int32[np.ndarray, "tokens"], images: int) -> None:
        video_token_id = getattr(self.config, "video_token_id", None)
        if video_token_id is not None and np.any(token_ids == video_token_id):
            raise MessageError(
                f"The prompt holds the video token {self.tokenizer.decode([video_token_id])!r}: "
                "bsjax reads text and images only."
            )
        placeholder_id = self.family.placeholder_id(self.config)
        image_token_id = self.family.image_token_id(self.config)
        if image_token_id != placeholder_id and np.any(token_ids == image_token_id):
            raise MessageError(
                f"A text contains {self.tokenizer.decode([image_token_id])!r}, which is reserved "
                "for the tokens of images: leave it out."
            )
        placeholders = int(np.count_nonzero(token_ids == placeholder_id))
        if placeholders == images:
            return
        token = self.tokenizer.decode([placeholder_id])
        cause = (
            f"Usually a text contains {token!r}: leave it out, the chat template writes it."
            if placeholders > images
            else "The checkpoint's chat template leaves images out: are they in a user message?"
        )
        raise MessageError(
            f"The messages hold {images} image{'s' * (images != 1)}, but the prompt has "
            f"{placeholders} image placeholder{'s' * (placeholders != 1)}. {cause}"
        )

    def _request_images(
        self,
        images: Sequence[ImagePart],
        sources: ImageSources,
        reader: ImageReader,
        known: KnownImages | None,
    ) -> list[_RequestedImage]:
        """Finds out the sizes of images, from their headers where that is possible."""
        found = []
        for number, image in enumerate(images, start=1):
            name = partial(_naming_image, image, number, len(images))
            with name():
                size = size_before_reading(image.key, image.source, sources)
                shapes = None if size is None else self._shapes(size, image, sources)
            places: dict[int, UInt8[np.ndarray, "_ values"]] = {}
            if known is None:
                read = partial(read_image, image.key, image.source, sources)
                request = reader.request(
                    partial(self._read_image, image, read, sources, places, name)
                )
                found.append((shapes, request, places, name, None))
            else:
                content = ImageContent(image, sources)
                read = partial(self._read_image, image, content.pixels, sources, places, name)
                request, digest = Requested(reader, read), Requested(reader, content.digest)
                found.append((shapes, request, places, name, digest))
        reader.begin([digest for *_, digest in found if digest is not None])
        unknown = [request for shapes, request, *_ in found if shapes is None]
        reader.wait_for(unknown, among=[request for _, request, *_ in found])
        return [
            _RequestedImage(shapes or request.result().shapes, request, *others)
            for shapes, request, *others in found
        ]

    def _read_image(
        self,
        image: ImagePart,
        read: Callable[[], PIL.Image.Image | np.ndarray],
        sources: ImageSources,
        places: Mapping[int, UInt8[np.ndarray, "_ values"]],
        name: Callable[[], AbstractContextManager[None]],
    ) -> _ReadImage:
        """Reads an image and cuts it into patches."""
        with name():
            pixels = read()
            shapes = self._shapes(image_size(pixels), image, sources)
            patches = self.family.image_patches(
                pixels, image.options, self.image_processor, self.config, places
            )
            return _ReadImage(shapes, patches)

    def _shapes(
        self, size: tuple[int, int], image: ImagePart, sources: ImageSources
    ) -> ImageShapes:
        shapes = self.family.image_shapes(*size, image.options, self.image_processor, self.config)
        if shapes.pixels > sources.max_scaled_pixels:
            raise MessageError(
                f"it would be scaled to {shapes.pixels:,} pixels, more than "
                f"{sources.max_scaled_pixels:,} (max_scaled_pixels)."
            )
        return shapes


@contextmanager
def _naming_image(image: ImagePart, number: int, images: int) -> Iterator[None]:
    """Errors raised inside the block say which image they are about."""
    label = f"Image {number} of {images} ({image.where}{shown_source(image.source)})"
    try:
        yield
    except MessageError as error:
        raise MessageError(f"{label}: {error}") from error
    except Exception as error:  # Decoders and HTTP clients raise many kinds of exceptions.
        raise MessageError(f"{label} cannot be read: {shortened(str(error), 300)}") from error
