"""What stands beside the weights: configuration, tokenizer, chat template, image settings."""

import json

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .scenes import COLOURS, CONTENTS, LABELS, SIDES

PATCH_SIZE = 4
MERGE_SIZE = 2
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

# Qwen's conversation format; each image stands after its letter, which is the token that it is in
# "image C" as well.
CHAT_TEMPLATE = """\
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- ' ' ~ 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[images.count % 26] -}}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- set images.count = images.count + 1 -%}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- else -%}
{{- raise_exception('This template knows text and images, not ' ~ part['type'] ~ '.') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen's kind, in which the words of all questions are tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)
    # A vocabulary's order in memory is not fixed, the files' bytes shall be.
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
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus() -> list[str]:
    """Every word that questions and answers are made from, with and without a space before it."""
    sentences = [
        "What is in image A?",
        "What colour is image A?",
        "Which image is red?",
        "Which image shows a circle?",
        "How many images are red?",
        "How many images show a circle?",
        "Do images A and B show the same?",
        "Do images A and B have the same colour?",
        "Which image repeats an earlier one?",
        "Which image repeats an earlier colour?",
        "yes no none system user assistant",
    ]
    names = [*COLOURS, *(content for content in CONTENTS if content.isalpha()), *LABELS]
    words = sorted({word for text in (*sentences, *names) for word in text.strip("?").split()})
    return [f"{word} {word} {word}" for word in words]


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Five layers of six heads of 32 channels; a tower of two blocks; patches of 4 x 4 pixels."""
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            # Qwen's embedding tables are longer than their vocabularies as well.
            "vocab_size": -(-(len(tokenizer) + 1) // 16) * 16,
            "hidden_size": 192,
            "intermediate_size": 448,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "max_window_layers": 5,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": special["<|endoftext|>"],
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 192,
            "fullatt_block_indexes": [1],
            "window_size": 16,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """Leaves images of the sizes of scenes as they are, and scales others to about that size."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": min(SIDES) ** 2, "longest_edge": max(SIDES) ** 2},
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=2,
    )


def make_generation_config(config: Qwen2_5_VLConfig) -> GenerationConfig:
    """Greedy answers that end with a message or a text."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
