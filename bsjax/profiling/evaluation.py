"""How far a sparse model's next-token distributions are from the dense model's, end to end.

Evaluating an array of categories costs one prefill per sample: categories are an input of one
compiled program, and a sample's embeddings, image features included, are computed once and kept on
the host.
"""

import hashlib
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, Int8, Int64

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import naming, whole_number
from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.template import Sinks
from bsjax.profiling import computations, selection
from bsjax.profiling.ordered_samples import Messages, OrderedSamples
from bsjax.profiling.prompt_inputs import (
    PackedPrompt,
    PromptEmbedding,
    Shape,
    append_tokens,
    category_schedule,
)
from bsjax.profiling.settings import Settings
from bsjax.profiling.state import NO_STATE, State
from bsjax.progress import Progress, no_progress
from bsjax.runtime.generation import generate
from bsjax.runtime.memory import bytes_available, check_memory
from bsjax.runtime.programs import Stage, check_model, check_one_device, programs_of
from bsjax.samples import Samples


class Comparison(NamedTuple):
    """How the next-token distributions of a sparse model compare with the dense model's.

    Attributes:
      kl: KL(dense || sparse) in nats, averaged over a sample's positions, then over samples.
      top1: share of positions whose likeliest tokens agree, averaged in the same way.
      kl_by_sample: mean KL over each sample's positions.
      top1_by_sample: share of each sample's positions whose likeliest tokens agree.
    """

    kl: float
    top1: float
    kl_by_sample: Float64[np.ndarray, "samples"]
    top1_by_sample: Float64[np.ndarray, "samples"]


class _Sample(NamedTuple):
    """A prompt followed by the dense answer, ready to run."""

    embeddings: np.ndarray
    arguments: tuple[Any, ...]
    rows: np.ndarray
    """Rows of the states to compare. If the answer ended early, the last row is repeated."""
    states: int
    """How many of these rows count, without repetitions."""
    dense: jax.Array
    """The dense model's states in these rows."""


class Evaluator:
    """Compares categories with dense attention over samples.

    Distributions are compared after the last token of the prompt and after each token of the dense
    model's greedy answer, which is fed to both models (teacher forcing). The answer stops at an
    end-of-sequence token, or before a token that represents an image. Samples are in the order of
    their fingerprints. Results are remembered: comparing the same categories again costs nothing.

    The host keeps the embeddings of all samples (rows x hidden values each).

    Attributes:
      fingerprints: fingerprints of the samples.
      sinks: which tokens of an image are sinks.
      flops: int64 [layers, 4], attention FLOPs of one head of each layer, by `HeadCategory`, summed
        over the samples' prompts.
      dense_answers: greedy token ids of the dense model for each sample.
      evaluations: how many different arrays of categories have been compared.
    """

    def __init__(
        self,
        model: LoadedModel,
        samples: Sequence[Messages] | Samples | OrderedSamples,
        *,
        answer_tokens: int = Settings.answer_tokens,
        sinks: Sinks | None = None,
        backend: str = "auto",
        state: State = NO_STATE,
        progress: Progress = no_progress,
        stage: str = "reading samples",
    ) -> None:
        """Generates the dense model's answers to the samples.

        Args:
          model: from `bsjax.load`.
          samples: conversations.
          answer_tokens: the most tokens of the dense answer to compare, at least 1.
          sinks: which tokens of an image are sinks; None means the first.
          backend: backend of the attention, see `sparse_attention`.
          state: keeps and recalls what was compared.
          progress: called after every sample, as `progress(stage, done, total)`.
          stage: name of this stage.

        Raises:
          ProfileError: there are no samples, or `answer_tokens` is below 1.
          BsjaxError: as for `generate`, if a prompt is not valid or does not fit.
        """
        check_model(model, ProfileError)
        check_one_device(model, ProfileError)
        samples = samples if isinstance(samples, OrderedSamples) else OrderedSamples.of(samples)
        self.answer_tokens = whole_number(
            "answer_tokens", answer_tokens, least=1, error=ProfileError
        )
        self._model = model
        self._samples = samples
        self.sinks = Sinks() if sinks is None else sinks
        self._backend = resolve_backend(backend)
        self._shape = Shape.of(model.family, model.config)
        self._state = state
        self._prepared: dict[int, _Sample] = {}
        self._compared: dict[bytes, Comparison] = {}
        self._what = f"{samples.fingerprint} {self.sinks} {self.answer_tokens}"
        self.fingerprints = samples.fingerprints

        self._records = []
        progress(stage, 0, len(samples.messages))
        for index, digest in enumerate(samples.fingerprints):
            name = f"dense answer {digest} {self.sinks} {self.answer_tokens}"
            read = naming(samples.places[index])(partial(self._read, index))
            self._records.append(state.recall(name, read))
            progress(stage, index + 1, len(samples.messages))
        self.flops: Int64[np.ndarray, "layers all_categories"] = np.sum(
            [record["flops"] for record in self._records], axis=0
        )
        self.dense_answers = tuple(tuple(r["answer"].tolist()) for r in self._records)

    @property
    def evaluations(self) -> int:
        """How many different arrays of categories have been compared."""
        return len(self._compared)

    def reduction(self, categories: Int8[np.ndarray, "layers heads"]) -> float:
        """The share of dense attention FLOPs, over the samples, that the categories save."""
        return selection.reduction_of(categories, self.flops)

    def compare(self, categories: Int8[np.ndarray, "layers heads"]) -> Comparison:
        """Compares the next-token distributions under these categories with the dense model's.

        Raises:
          ProfileError: there is not exactly one category per layer and head.
        """
        categories = np.ascontiguousarray(categories, np.int8)
        wanted = (self._shape.layers, self._shape.heads)
        if categories.shape != wanted or not np.isin(categories, list(HeadCategory)).all():
            raise ProfileError(
                f"`categories` must hold one HeadCategory per layer and head, {wanted}, got the "
                f"shape {categories.shape} of values {np.unique(categories)[:8].tolist()}."
            )
        key = categories.tobytes()
        if key not in self._compared:
            name = hashlib.sha256(self._what.encode() + key).hexdigest()
            record = self._state.recall(f"compared {name}", lambda: self.divergences(categories))
            kl, top1 = record["kl"], record["top1"]
            self._compared[key] = Comparison(float(kl.mean()), float(top1.mean()), kl, top1)
        return self._compared[key]

    def divergences(self, categories: np.ndarray) -> dict[str, np.ndarray]:
        """Mean divergence from the dense model (`kl`) and agreement (`top1`) of every sample."""
        programs = programs_of(self._model)
        kl, top1 = [], []
        for index in range(len(self.fingerprints)):
            sample = self._sample(index)
            sparse = self._states(sample.embeddings, categories, *sample.arguments, sample.rows)
            arguments = (sample.dense, sparse)
            of_states, agree = programs.get(computations.divergence, arguments)(*arguments)
            kl.append(np.asarray(of_states, np.float64)[: sample.states].mean())
            top1.append(np.asarray(agree)[: sample.states].mean())
        return {"kl": np.asarray(kl, np.float64), "top1": np.asarray(top1, np.float64)}

    def _read(self, index: int) -> dict[str, np.ndarray]:
        """The dense answer of a sample, and the FLOPs of its prompt."""
        messages = self._samples.messages[index]
        answer = generate(
            self._model, messages, max_new_tokens=self.answer_tokens, backend=self._backend
        )
        prompt = self._model.prompt(messages)
        template = self._model.family.template(prompt, self._model.config, self.sinks)
        return {
            "answer": np.asarray(answer.token_ids, np.int64),
            "stopped": np.asarray(answer.finish_reason == "stop"),
            "flops": self._shape.category_flops(template),
        }

    def _sample(self, index: int) -> _Sample:
        """Embeddings and dense states of a sample, computed when first needed."""
        if index not in self._prepared:
            record = self._records[index]
            answer = record["answer"].tolist()
            # Nothing follows the end-of-sequence token of a finished answer.
            answer = answer[:-1] if record["stopped"] else answer
            with naming(self._samples.places[index]):
                self._prepared[index] = self._prepare(index, self._before_images(answer))
        return self._prepared[index]

    def _before_images(self, answer: list[int]) -> list[int]:
        """The answer up to the first token that would add an image to the prompt."""
        config, family = self._model.config, self._model.family
        image_tokens = {
            family.image_token_id(config),
            family.placeholder_id(config),
            getattr(config, "video_token_id", None),
        }
        return list(itertools.takewhile(lambda token: token not in image_tokens, answer))

    def _prepare(self, index: int, answer: list[int]) -> _Sample:
        model, backend = self._model, self._backend
        prompt = model.prompt(self._samples.messages[index])
        whole = append_tokens(prompt, answer)
        packed = PackedPrompt.of(model.architecture, whole, self.sinks, backend)
        embedding = PromptEmbedding(programs_of(model), packed, backend)
        schedules = packed.schedules(self._shape, model.dtype, backend, category_schedule)
        arguments = (packed.position_ids, schedules)

        states = np.minimum(np.arange(self.answer_tokens + 1), len(answer))
        rows = packed.row[prompt.token_ids.size - 1 + states].astype(np.int32)
        dense = np.zeros((self._shape.layers, self._shape.heads), np.int8)
        program = self._program(embedding.output, dense, *arguments, rows)
        check_memory(
            packed.inputs, [*embedding.stages, Stage("comparing", program)], bytes_available()
        )

        embeddings = np.asarray(embedding.run())
        return _Sample(
            embeddings,
            arguments,
            rows,
            len(answer) + 1,
            self._states(embeddings, dense, *arguments, rows),
        )

    def _states(self, embeddings: Any, categories: np.ndarray, *arguments: Any) -> jax.Array:
        position_ids, schedules, rows = arguments
        program = self._program(embeddings, categories, *arguments)
        head_category = categories.astype(np.int32)
        return program(jax.device_put(embeddings), position_ids, schedules, head_category, rows)

    def _program(self, embeddings: Any, categories: np.ndarray, *arguments: Any) -> Any:
        position_ids, schedules, rows = arguments
        return programs_of(self._model).get(
            computations.states_at,
            (embeddings, position_ids, schedules, categories.astype(np.int32), rows),
            static=(self._backend,),
        )
