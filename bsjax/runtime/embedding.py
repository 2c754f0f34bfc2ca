"""Embeddings of a prompt, images included: what prefill starts from.

    embed -> encode images (first group) -> encode images (second group) -> ...

Each file for a stage of `bsjax.runtime` has the functions that are compiled (of a module and
arrays) and the class that compiles and runs them.
"""

import time
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from bsjax.models import ImageTextModel
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.memory import Stage
from bsjax.runtime.programs import Programs, size_in_bytes


def embed(module: ImageTextModel, token_ids: Int[Array, "rows"]) -> Float[Array, "rows hidden"]:
    """Embeddings of all rows; those of image tokens are placeholders."""
    return module.language_model.embed(token_ids)


def encode_images(
    module: ImageTextModel,
    embeddings: Float[Array, "rows hidden"],
    pixel_values: Float[Array, "patches pixels"],
    plan: Any,
    image_rows: Int[Array, "merged"],
    backend: str,
) -> Float[Array, "rows hidden"]:
    """Encodes a group of images and writes their features into the prompt's embeddings.

    Donate `embeddings` so that they are updated in place.

    Args:
      module: the model.
      embeddings: embeddings of all rows.
      pixel_values: patches of the images, padded.
      plan: from the family's `vision_plan`.
      image_rows: the row of each image token; `PADDING_ROW` for tokens made of padding.
      backend: attention backend.
    """
    features = module.encode_images(pixel_values, plan, backend=backend)
    return embeddings.at[image_rows].set(features.astype(embeddings.dtype), mode="drop")


class Embedding:
    """The stages that turn token ids and pixels into embeddings.

    Attributes:
      inputs: the inputs of the prompt.
      stages: all stages, in the order in which they run. Image groups of the same padded size share
        a program.
      output: shape and dtype of the embeddings.
    """

    def __init__(self, programs: Programs, inputs: ModelInputs, backend: str) -> None:
        self.inputs = inputs
        self._embed = programs.get(embed, (inputs.token_ids,))
        self.output = self._embed.output
        self._encode = [
            programs.get(
                encode_images, (self.output, *group.arguments), static=(backend,), donate=(0,)
            )
            for group in inputs.image_groups
        ]
        self.stages = [Stage("embed", self._embed)]
        for index, program in enumerate(self._encode):
            # The pixels of the next group are copied to the device while this one runs.
            following = inputs.image_groups[index + 1 : index + 2]
            copied = sum(size_in_bytes(group.arguments[0]) for group in following)
            self.stages.append(Stage("vision", program, copied))

    def run(self) -> tuple[jax.Array, float]:
        """Returns the embeddings and the seconds that the vision tower took."""
        embeddings = self._embed(self.inputs.token_ids)
        start = time.perf_counter()
        for group, encode in zip(self.inputs.image_groups, self._encode, strict=True):
            pixel_values = jax.device_put(group.pixel_values())
            # At most two groups' pixels are on the device: the next ones and those being encoded.
            jax.block_until_ready(embeddings)
            embeddings = encode(embeddings, pixel_values, group.plan, group.image_rows)
        jax.block_until_ready(embeddings)
        return embeddings, time.perf_counter() - start
