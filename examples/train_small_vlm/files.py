"""Everything but the weights: configuration, tokenizer, chat template, image settings."""

from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .. import qwen_files
from ..qwen_files import train_tokenizer
from .scenes import COLOURS, CONTENTS, LABELS, SIDES

PATCH_SIZE = 4
MERGE_SIZE = 1
# Qwen's conversation format. Each image is followed by its letter, the same token as in "image C".
CHAT_TEMPLATE = """\
{%- set images = namespace(count=0, last=false) -%}
{%- for message in messages -%}
{%- set images.last = false -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{{- ' ' ~ 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[images.count % 26] -}}
{%- set images.count = images.count + 1 -%}
{%- set images.last = true -%}
{%- elif 'text' in part -%}
{{- '\\n' if images.last else '' -}}
{{- part['text'] -}}
{%- set images.last = false -%}
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
    """A byte-level BPE tokenizer like Qwen's, in which each word of a question is a token."""
    return train_tokenizer(_corpus(), vocabulary_size=4096, chat_template=CHAT_TEMPLATE)


def _corpus() -> list[str]:
    """Every word in questions and answers, with and without a space before it."""
    sentences = [
        "What is in image A?",
        "What colour is image A?",
        "Which image is red?",
        "Which image shows a circle?",
        "How many images are red?",
        "How many images show a circle?",
        "Is image A like image B?",
        "Is image A coloured like image B?",
        "What comes twice?",
        "Which colour comes twice?",
        "yes no none system user assistant",
    ]
    names = [*COLOURS, *(content for content in CONTENTS if content.isalpha()), *LABELS]
    words = sorted({word for text in (*sentences, *names) for word in text.strip("?").split()})
    return [f"{word} {word} {word}" for word in words]


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Five layers with six heads of 32 channels; a tower of two blocks; one token per patch."""
    return qwen_files.make_config(
        tokenizer,
        text={
            "hidden_size": 192,
            "intermediate_size": 448,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        vision={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
            "window_size": 16,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
        },
    )


def make_image_processor() -> Qwen2VLImageProcessorPil:
    """An image processor that does not resize images of scenes, and scales others to such sizes."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": min(SIDES) ** 2, "longest_edge": max(SIDES) ** 2},
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=2,
    )
