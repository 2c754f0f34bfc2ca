"""Times the building of the block masks of a whole model on the host.

    python -m benchmarks.mask_build

The model has 28 layers x 28 heads with mixed categories; prompts have about 36K and 300K tokens.
Three things are timed: one schedule for all layers, with a table per category; two schedules, for
the global and the local layers of Gemma 3; and the `BlockMask` of a single layer.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write_result
from bsjax import BlockMask, HeadCategory, Image, Template, Text
from bsjax.masks.schedule import build_schedule, category_tables
from bsjax.masks.visibility import Visibility

LAYERS, HEADS = 28, 28
WORKLOADS = (  # images, tokens per image, text tokens per image
    (90, 400, 8),
    (36, 1000, 8),
    (20, 1800, 8),
    (735, 400, 8),
    (298, 1000, 8),
    (1128, 256, 10),
)


def milliseconds(call: Any, rounds: int) -> list[float]:
    call()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def measure(rounds: int) -> list[dict[str, Any]]:
    categories = np.random.default_rng(0).integers(0, len(HeadCategory), (LAYERS, HEADS))
    rows = []
    for images, image_tokens, text_tokens in WORKLOADS:
        segments = [Text(text_tokens), Image(image_tokens)] * images + [Text(8)]
        template = Template.from_segments(segments)

        def whole_model(template: Template = template) -> None:
            # Every prompt has a template of its own, so nothing that a template caches is reused.
            fresh = Template(template.image, template.sink)
            build_schedule(fresh, category_tables(categories), block_q=128, block_kv=64)

        def gemma3(template: Template = template) -> None:
            fresh = Template(template.image, template.sink)
            for window in (1024, None):
                build_schedule(
                    fresh,
                    category_tables(categories),
                    block_q=128,
                    block_kv=64,
                    visibility=Visibility(bidirectional_images=True, window=window),
                )

        one_layer = milliseconds(lambda t=template: BlockMask(t, categories[0].tolist()), rounds)
        rows.append(
            {
                "tokens": template.tokens,
                "images": images,
                "image_tokens": image_tokens,
                "whole_model_milliseconds": milliseconds(whole_model, rounds),
                "gemma3_milliseconds": milliseconds(gemma3, rounds),
                "one_layer_mask_milliseconds": one_layer,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    table = Table(
        title=f"Block masks of {LAYERS} layers x {HEADS} heads, four categories mixed; medians"
    )
    for column in ("tokens", "images", "ms, all layers", "ms, Gemma 3", "ms, one BlockMask"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            f"{row['images']} x {row['image_tokens']}",
            f"{statistics.median(row['whole_model_milliseconds']):.1f}",
            f"{statistics.median(row['gemma3_milliseconds']):.1f}",
            f"{statistics.median(row['one_layer_mask_milliseconds']):.1f}",
        )
    Console(width=100).print(table)
    result = {"layers": LAYERS, "heads": HEADS, "rows": rows}
    print(f"written to {write_result('mask_build', result, arguments.output)}")


if __name__ == "__main__":
    main()
