"""The templates that `tools.gpu_check` runs, and the kinds of visibility."""

import numpy as np

from bsjax.masks.template import Image, Sinks, Template, Text
from bsjax.masks.visibility import CAUSAL, Visibility

VISIBILITIES = {
    "causal": CAUSAL,
    "bidirectional images": Visibility(bidirectional_images=True),
    "window": Visibility(window=100),
    "bidirectional images in a window": Visibility(bidirectional_images=True, window=33),
}
TEMPLATES = {
    "ragged": Template.from_segments(
        [Text(11), Image(245), Text(3), Image(1), Image(120), Text(7), Image(133), Text(1)],
        Sinks(first=1, offsets=(4, 70)),
    ),
    "images of one token": Template.from_segments([Text(2), Image(1), Image(1), Text(1)] * 60),
    "no text": Template.from_segments([Image(300), Image(77), Image(300)]),
    "no image": Template.from_segments([Text(517)]),
    "200 images": Template.from_segments([Text(3), Image(17)] * 200 + [Text(5)]),
    "fewer tokens than a block": Template.from_segments([Text(2), Image(3)]),
    "8K tokens": Template.from_segments([Text(8), Image(400)] * 20 + [Text(32)]),
}
TEMPLATES["9K tokens"] = Template.from_segments([Text(8), Image(400)] * 22 + [Text(32)])
LONG_TEMPLATES = ("8K tokens", "9K tokens")
SMALL_TEMPLATE = "small"
TEMPLATES[SMALL_TEMPLATE] = Template.from_segments(
    [Text(9), Image(40), Text(3), Image(1), Image(25), Text(2)], Sinks(offsets=(3,))
)
FUZZED = "random"
FUZZED_TOKENS = 1024


def random_template(seed: int) -> Template:
    """Text and images of random lengths, some of a single token."""
    generator = np.random.default_rng(seed)
    segments: list[Text | Image] = []
    left = FUZZED_TOKENS - int(generator.integers(0, 200))
    while left > 0:
        length = int(min(left, generator.choice([1, 2, 15, 16, 17, 63, 64, 65, 128, 200])))
        segments.append(Image(length) if generator.random() < 0.6 else Text(length))
        left -= length
    offsets = tuple(generator.integers(0, 60, generator.integers(0, 3)).tolist())
    return Template.from_segments(segments, Sinks(int(generator.integers(1, 4)), offsets))
