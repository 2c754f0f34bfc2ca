"""The files of a small Qwen2.5-VL checkpoint other than weights: tokenizer and configuration."""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def train_tokenizer(
    texts: Iterable[str], *, vocabulary_size: int, chat_template: str
) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen's kind.

    Args:
      texts: the texts on which byte pairs are counted.
      vocabulary_size: the largest size of the vocabulary, without special tokens.
      chat_template: the tokenizer's chat template.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    # The order of a vocabulary in memory varies, but the bytes of the files must not.
    vocabulary = dict(sorted(trained.get_vocab().items(), key=lambda entry: entry[1]))
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(tokenizer: Qwen2Tokenizer, *, text: dict, vision: dict) -> Qwen2_5_VLConfig:
    """A configuration with the tokenizer's special tokens and Qwen's usual settings.

    Args:
      tokenizer: from `train_tokenizer`.
      text: settings of the language model.
      vision: settings of the vision tower.
    """
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            # Qwen's embedding tables are longer than their vocabularies as well.
            "vocab_size": -(-(len(tokenizer) + 1) // 16) * 16,
            "max_position_embeddings": 32768,
            "max_window_layers": text["num_hidden_layers"],
            "rms_norm_eps": 1e-6,
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
            **text,
        },
        vision_config={
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def make_generation_config(config: Qwen2_5_VLConfig) -> GenerationConfig:
    """Settings for greedy answers, which end at the end of a message or of a text."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
