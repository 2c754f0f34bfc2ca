"""Makes examples/tiny-qwen2.5-vl: a Qwen2.5-VL checkpoint of a few MB in Hugging Face's format.

Its weights are random numbers from a fixed seed, so its answers are noise. Its format is real:
configuration, safetensors, tokenizer, chat template and image settings are like those of any
Qwen2.5-VL checkpoint, only smaller.

    python -m examples.make_tiny_checkpoint [FOLDER]

Needs torch (the `test` extra), because transformers itself writes the files.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.qwen_files import (
    SPECIAL_TOKENS,
    make_config,
    make_generation_config,
    train_tokenizer,
)

SEED = 20240914
FOLDER = Path(__file__).parent / "tiny-qwen2.5-vl"
BYTE_PAIR_VOCABULARY = 1016  # An upper limit: the corpus has fewer pairs.

# Qwen's conversation format: one placeholder per image between the vision delimiters, preceded by
# "Picture n: " if the caller asks for numbered pictures.
CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set pictures.count = pictures.count + 1 -%}
{%- if add_vision_id -%}{{- 'Picture ' ~ pictures.count ~ ': ' -}}{%- endif -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
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

# The text on which the byte pairs of the vocabulary are counted.
CORPUS = """\
You are a helpful assistant. system user assistant Picture 1: Picture 2: Picture 3:
What is in this picture? What do these pictures show? Describe each picture in one sentence.
Which of the pictures shows a flower? Which picture shows a building? How many pictures are there?
The first picture shows a temple with a curved roof, stone steps and trees in front of the hills.
The second picture shows a large orange flower with many petals on a dark green background.
This picture is a crop of the first one. This picture is a part of the second one, seen closer.
There is a tower on the left, a wall on the right, and a clear blue sky above the roof.
There are three people standing near the gate, two of them with a red umbrella and a black bag.
A small white dog is running across the grass while a brown cat sleeps on the chair by the window.
The colour of the car is yellow, the bus behind it is green, and the street is wet after the rain.
In the background you can see mountains, clouds, a river with a bridge and several small boats.
On the table there are a cup of coffee, a plate with bread and cheese, some fruit and a knife.
The image was taken in the evening; the light is warm and the shadows of the houses are long.
The text on the sign reads "open", and the number on the door is 27. It looks like an old shop.
No, the two pictures do not show the same place. Yes, both of them were taken outside, in summer.
I cannot tell from this picture. It is not clear who they are or what they are doing there.
Compare the first picture with the last one: which has more colours, and where is the difference?
The shape is round, square, long, narrow, wide, tall, short, thick or thin; the surface is smooth.
Count the objects: one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve.
Black, white, grey, brown, red, orange, yellow, green, blue, purple and pink are names of colours.
At the top, at the bottom, in the middle, in the corner, next to, between, behind, in front of.
A person, a man, a woman, a child, children, people, a bird, a horse, a tree, a leaf, water, sand.
"""


def make_tiny_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """A configuration with head dimension 64 in both towers, the smallest for the GPU kernel."""
    return make_config(
        tokenizer,
        text={
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [8, 12, 12],
            },
        },
        vision={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 1,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
    )


def fill_with_random_numbers(model: torch.nn.Module, first_special_token: int) -> None:
    """Draws parameters in the order of their names: the same numbers on any machine."""
    generator = np.random.default_rng(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = generator.standard_normal(tuple(parameter.shape), np.float32)
            if "norm" in name or "ln_q" in name:
                values = 1 + 0.1 * values
            elif name.endswith("bias"):
                values = 0.1 * values
            else:
                values = values / np.sqrt(values[0].size)
            if name.endswith("embed_tokens.weight"):
                # The table is also the output layer: random logits must not end an answer at once.
                values[first_special_token:] *= 0.25
            parameter.copy_(torch.from_numpy(values))


def main(folder: Path) -> None:
    """Writes the checkpoint."""
    tokenizer = train_tokenizer(
        CORPUS.splitlines(), vocabulary_size=BYTE_PAIR_VOCABULARY, chat_template=CHAT_TEMPLATE
    )
    config = make_tiny_config(tokenizer)
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    fill_with_random_numbers(model, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0]))
    model.generation_config = make_generation_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    ).save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {parameters / 1e6:.2f} million parameters, random")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
