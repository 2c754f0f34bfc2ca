"""How the tokens of an answer are chosen: a call's arguments, and the checkpoint's where it says.

The checkpoint's generation config (generation_config.json) is that of transformers. What it does
not say is as in transformers' `generate`, apart from the number of new tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from bsjax.checks import (
    argument,
    arguments_named,
    naming,
    shown,
    truth_value,
    whole_number,
)
from bsjax.errors import GenerationError
from bsjax.runtime.results import checked_stop
from bsjax.runtime.sampling import Sampling

DEFAULT_NEW_TOKENS = 64

# transformers' `generate` draws from that many tokens, unless the config says otherwise.
_DEFAULT_TOP_K = 50

_COMPUTED = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "stop_strings",
    "eos_token_id",
}

_ONLY_FOR_DRAWS = {"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}

_WITHOUT_EFFECT = {
    # What else is returned, and how fast. Drafts of another model do not change the answer.
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "use_mtp",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "prefill_chunk_size",
    "low_memory",
    # Of tokens that a prompt begins with or is padded with.
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    # Only for beams, which are refused.
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    # Probabilities sum to one, and are numbers, without these.
    "renormalize_logits",
    "remove_invalid_values",
    # Where the config comes from.
    "_from_model_config",
    "transformers_version",
}

# Values, other than None, that have no effect.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "penalty_alpha": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "typical_p": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "token_healing": False,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A caller's arguments for choosing tokens; None where the caller says nothing.

    Attributes:
      max_new_tokens: as for `bsjax.generate`, like all others.
      temperature: see there.
      top_k: see there.
      top_p: see there.
      min_p: see there.
      repetition_penalty: see there.
      stop: see there.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: str | Sequence[str] | None = None

    def new_tokens(self) -> int:
        """The most tokens to generate.

        Raises:
          GenerationError: it is not a whole number above 0.
        """
        number = DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        return whole_number("max_new_tokens", number, least=1, error=GenerationError)

    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer.

        Raises:
          GenerationError: as for `checked_stop`.
        """
        return checked_stop(self.stop)

    def sampling(self, seed: int) -> Sampling:
        """What the programs are given.

        Raises:
          GenerationError: an argument is out of range.
        """
        return Sampling.checked(
            0.0 if self.temperature is None else self.temperature,
            self.top_k,
            self.top_p,
            seed,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def completed(self, config: GenerationConfig | None) -> "Choice":
        """This choice, with what the caller does not say from a checkpoint's generation config.

        Args:
          config: the generation config; None changes nothing.

        Raises:
          GenerationError: a setting of the config is invalid, or is not computed by bsjax and would
            change the answer.
        """
        if config is None:
            return self
        # Checked here, so that an error says where the value comes from: it is no option of a
        # command.
        with naming("The checkpoint's generation config"), arguments_named({}):
            theirs = _choice_of(config)
            theirs.sampling(seed=0)
            theirs.new_tokens()
            theirs.stops()
        ours = {name: value for name, value in vars(self).items() if value is not None}
        result = dataclasses.replace(theirs, **ours)
        _refuse_others(config, result, self)
        return result


def _choice_of(config: GenerationConfig) -> Choice:
    """What a generation config says about the arguments of `bsjax.generate`."""
    draws = config.do_sample is not None and truth_value(
        "do_sample", config.do_sample, error=GenerationError
    )
    temperature = 1.0 if config.temperature is None else config.temperature
    top_k = _DEFAULT_TOP_K if config.top_k is None else config.top_k
    return Choice(
        max_new_tokens=config.max_new_tokens,
        temperature=temperature if draws else 0.0,
        top_k=None if type(top_k) is int and top_k == 0 else top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop_strings,
    )


def _refuse_others(config: GenerationConfig, choice: Choice, given: Choice) -> None:
    """Refuses settings that would change the answer and are not computed."""
    ignored = _COMPUTED | _WITHOUT_EFFECT
    if not choice.sampling(seed=0).temperature:
        ignored = ignored | _ONLY_FOR_DRAWS
    if given.max_new_tokens is not None or config.max_new_tokens is not None:
        ignored = ignored | {"max_length"}
    # Only what transformers itself knows: it ignores other names in the file.
    for name in vars(GenerationConfig()):
        value = getattr(config, name)
        if name in ignored or value is None:
            continue
        if name in _NEUTRAL and _is(value, _NEUTRAL[name]):
            continue
        advice = (
            f"give {argument('max_new_tokens')}, which goes before it"
            if name == "max_length"
            else f"leave {argument('use_generation_config')} out and give the other settings "
            "yourself"
        )
        raise GenerationError(
            f"The checkpoint's generation config sets {name} to {shown(value)}, which bsjax does "
            f"not compute and which would change the answer: {advice}."
        )


def _is(value: Any, neutral: Any) -> bool:
    return isinstance(value, int | float) and value == neutral
