"""Turns chat messages into what a model reads: token ids, pixel values and tokens per image.

Chat template, tokenizer and image processor are the checkpoint's own, from transformers; none of
them needs torch. `Processor` and the model's `Family` do what Hugging Face's processors add: the
chat template writes one placeholder per image, the family expands it, and image tokens are repeated
until each image has all of its tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bsjax.checks import argument, is_failure, truth_value, whole_number
from bsjax.errors import MessageError
from bsjax.models.family import Family, ProcessedImage
from bsjax.prompts.images import check_image, image_size, read_image, shortened, shown_source
from bsjax.prompts.messages import ImagePart, check_answer, read_messages
from bsjax.prompts.rendering import rendered
from bsjax.prompts.sources import DEFAULT_SOURCES, ImageSources

# Height and width of an image that no option refuses for its size.
_ANY_SIZE = (224, 224)


@dataclass(frozen=True)
class Prompt:
    """A prompt in prompt order, on the host."""

    token_ids: Int32[np.ndarray, "tokens"]
    """Token ids, with the id of an image token once for every image token."""
    pixel_values: Float32[np.ndarray, "patches patch_values"] | None
    """Patches of all images, one image after the other; None without images."""
    grid_thw: Int32[np.ndarray, "images 3"]
    """Patches of each image along time, height and width."""
    image_tokens: tuple[int, ...]
    """Tokens of each image, in prompt order."""


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
                    self._check_scaled(size, image, options.sources)

    def check_image_options(self, options: Mapping[str, Any]) -> None:
        """Checks the options that image parts will have; None is no option.

        Raises:
          MessageError: this model does not have one of them, or its value is invalid.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if given:
            self.family.scaled_pixels(*_ANY_SIZE, given, self.image_processor)

    def prompt_of(self, messages: Any, options: PromptOptions) -> Prompt:
        """Like `prompt`, with options that have been checked."""
        template_messages, images = self._read(messages, options)
        text = rendered(
            self.tokenizer,
            template_messages,
            continue_final_message=options.continue_final_message,
        )
        token_ids, processed = self._processed(text, images, options.sources)
        return self._assembled(token_ids, processed)

    def answered_prompt(self, messages: Any, options: PromptOptions) -> AnsweredPrompt:
        """A prompt that ends with the text of its answer, and where the answer begins.

        The whole text is tokenized at once. The answer begins at the first token that the prompt
        without it does not have: where a token holds the last characters of the prompt and the
        first of the answer, that token is the first of the answer.

        Args:
          messages: as for `prompt`; the last one is the answer, and the assistant's.
          options: as for `prompt`.

        Raises:
          MessageError: as for `prompt`; or the chat template writes an answer differently from the
            way that it lets one begin, or no token comes before the answer.
        """
        template_messages, images = self._read(messages, options, answered=True)
        text = rendered(self.tokenizer, template_messages, continue_final_message=True)
        before = rendered(self.tokenizer, template_messages[:-1])
        if not text.startswith(before):
            raise MessageError(
                f"The chat template of {self.tokenizer.name_or_path or 'the tokenizer'} writes an "
                "answer of the assistant differently from the way that it lets one begin, so that "
                "the answer's tokens cannot be told from those of the prompt."
            )
        token_ids, processed = self._processed(text, images, options.sources)
        ids_before = self._expanded(before, self._tokenize(before), processed)
        shared = min(token_ids.size, ids_before.size)
        differ = np.flatnonzero(token_ids[:shared] != ids_before[:shared])
        first = int(differ[0]) if differ.size else shared
        if not 0 < first < token_ids.size:
            raise MessageError(
                "The tokens of the last message cannot be told from those of the messages before "
                "it: the tokenizer joins them."
            )
        start = int(self._repeats(token_ids, processed)[:first].sum())
        return AnsweredPrompt(self._assembled(token_ids, processed), start)

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
        if answered and len(template_messages) == 1:
            raise MessageError("messages[0] is an answer to nothing: give a user message first.")
        if options.max_pixels is not None:
            default = {"max_pixels": options.max_pixels}
            images = [image._replace(options=default | image.options) for image in images]
        return template_messages, images

    def _processed(
        self, text: str, images: Sequence[ImagePart], sources: ImageSources
    ) -> tuple[Int32[np.ndarray, "expanded"], list[ProcessedImage]]:
        """The token ids of a rendered template, and the images, cut into patches."""
        token_ids = self._tokenize(text)
        self._check_placeholders(token_ids, len(images))
        processed = self._process_images(images, sources)
        return self._expanded(text, token_ids, processed), processed

    def _expanded(
        self,
        text: str,
        token_ids: Int32[np.ndarray, "tokens"],
        processed: Sequence[ProcessedImage],
    ) -> Int32[np.ndarray, "expanded"]:
        """The token ids of a text, with one token for each image and each crop."""
        if not processed:
            return token_ids
        expanded = self.family.expand(
            text, [len(each.image_tokens) for each in processed], self.tokenizer, self.config
        )
        return token_ids if expanded == text else self._tokenize(expanded)

    def _repeats(
        self, token_ids: Int32[np.ndarray, "expanded"], processed: Sequence[ProcessedImage]
    ) -> Int64[np.ndarray, "expanded"]:
        """How often each token is in the prompt: an image's as often as the image has tokens."""
        repeats = np.ones(token_ids.size, np.int64)
        if processed:
            image_tokens = np.concatenate([each.image_tokens for each in processed])
            repeats[token_ids == self.family.image_token_id(self.config)] = image_tokens
        return repeats

    def _assembled(
        self, token_ids: Int32[np.ndarray, "expanded"], processed: Sequence[ProcessedImage]
    ) -> Prompt:
        if not processed:
            return Prompt(token_ids, None, np.zeros((0, 3), np.int32), ())
        image_tokens = np.concatenate([each.image_tokens for each in processed])
        return Prompt(
            np.repeat(token_ids, self._repeats(token_ids, processed)),
            np.concatenate([each.pixel_values for each in processed]),
            np.concatenate([each.grid_thw for each in processed]).astype(np.int32),
            tuple(image_tokens.tolist()),
        )

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

    def _process_images(
        self, images: Sequence[ImagePart], sources: ImageSources
    ) -> list[ProcessedImage]:
        """Reads images and cuts them into patches, one by one, so that errors can name them."""
        processed = []
        for number, image in enumerate(images, start=1):
            with _naming_image(image, number, len(images)):
                pixels = read_image(image.key, image.source, sources)
                self._check_scaled(image_size(pixels), image, sources)
                processed.append(
                    self.family.process_image(
                        pixels, image.options, self.image_processor, self.config
                    )
                )
        return processed

    def _check_scaled(self, size: tuple[int, int], image: ImagePart, sources: ImageSources) -> None:
        scaled = self.family.scaled_pixels(*size, image.options, self.image_processor)
        if scaled > sources.max_scaled_pixels:
            raise MessageError(
                f"it would be scaled to {scaled:,} pixels, more than "
                f"{sources.max_scaled_pixels:,} (max_scaled_pixels)."
            )


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
