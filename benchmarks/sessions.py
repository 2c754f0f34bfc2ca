"""Measures the second turn of a conversation, with a session and without one.

    python -m benchmarks.sessions                             # a small model, random, float32
    python -m benchmarks.sessions --size qwen2.5-vl-7b --tokens 36000 --image-size 560 560
    python -m benchmarks.sessions --checkpoint FOLDER --profile FILE --tokens 8192 \\
        --image-size 728 728                                  # 12 images, real weights

The first turn shows images and asks a question. The second turn is either another question or one
more image with a question. Each is answered by a session that has answered the first turn, and by
`bsjax.generate`. Seconds are those of vision tower and prefill, without image processing on the
host and without compilation. Unless a checkpoint is named, weights are random. The table says
whether both answers begin with the same token.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bsjax
from benchmarks.measure import RESULTS, markdown_table, write_result
from benchmarks.random_models import SIZES, loaded_model, model_config, noise_image, random_module
from bsjax import LoadedModel, Profile

TURNS = ("first", "question", "image")
"""The first turn; then a question, or one more image and a question."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    result = measure(options)
    print(render(result))
    path = write_result(
        f"sessions_{result['size']}_{jax.default_backend()}", result, options.output
    )
    print(f"\nwritten to {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small" if on_cpu else "qwen2.5-vl-7b")
    parser.add_argument(
        "--checkpoint", type=Path, help="a converted checkpoint, in place of --size"
    )
    parser.add_argument("--profile", help="its profile; default: all heads INTRA_IMAGE_SINK")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(392, 392), metavar=("WIDTH", "HEIGHT")
    )
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all conversations; returns what goes into the JSON file."""
    if options.checkpoint is None:
        config = model_config(options.size)
        model = loaded_model(config, random_module(config, options.dtype), options.dtype)
    else:
        model = bsjax.load(options.checkpoint, options.dtype)
    sparse = Profile.resolve(options.profile, model) or Profile.uniform("INTRA_IMAGE_SINK", model)
    rows = []
    for tokens in options.tokens:
        turns = _conversations(model, tokens, tuple(options.image_size))
        for name, profile in {"dense": None, "sparse": sparse}.items():
            bsjax.warmup(model, max_tokens=_room(tokens), profile=profile, scoring=False)
            samples = [_round(model, profile, turns, tokens) for _ in range(options.rounds)]
            rows.append({"tokens": tokens, "heads": name, **_summary(samples)})
    return {
        "size": options.size if options.checkpoint is None else options.checkpoint.name,
        "weights": "random" if options.checkpoint is None else "trained",
        "dtype": options.dtype,
        "rows": rows,
    }


def _room(tokens: int) -> int:
    """The most tokens of a session whose first turn has `tokens`."""
    return 2 * tokens + 1024


def _conversations(
    model: LoadedModel, tokens: int, size: tuple[int, int]
) -> dict[str, list[dict[str, Any]]]:
    """Chat messages up to each turn. Images fill the first turn up to `tokens` tokens."""
    random = np.random.default_rng(0)

    def picture() -> dict[str, Any]:
        return noise_image(model, size, random)

    def user(*parts: dict[str, Any], text: str) -> dict[str, Any]:
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    one = model.prompt([user(picture(), text="What is it?")]).token_ids.size
    first = user(*(picture() for _ in range(max(1, tokens // one))), text="What is it?")
    answered = [first, {"role": "assistant", "content": "Noise."}]
    return {
        "first": [first],
        "question": [*answered, user(text="And in the last picture?")],
        "image": [*answered, user(picture(), text="And in this one?")],
    }


def _round(
    model: LoadedModel,
    profile: Profile | None,
    turns: dict[str, list[dict[str, Any]]],
    tokens: int,
) -> dict[str, Any]:
    """The statistics of each turn, with a session and without one."""
    session = bsjax.Session(model, profile=profile, max_tokens=_room(tokens))
    sample: dict[str, Any] = {}
    for turn in TURNS:
        plain = bsjax.generate(model, turns[turn], profile=profile, max_new_tokens=1)
        if turn == "image":
            # Gemma 3's local layers cannot go back to the end of the first turn.
            session.clear()
            session.generate(turns["first"], max_new_tokens=1)
        answer = session.generate(turns[turn], max_new_tokens=1)
        sample[turn] = {
            "prompt_tokens": plain.prompt_tokens,
            "images": len(plain.stats.image_tokens),
            "reused_tokens": answer.stats.reused_tokens,
            "plain_seconds": plain.stats.vision_seconds + plain.stats.prefill_seconds,
            "session_seconds": answer.stats.vision_seconds + answer.stats.prefill_seconds,
            "same_token": answer.token_ids == plain.token_ids,
        }
    return sample


def _summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"samples": samples}
    for turn in TURNS:
        of_turn = [sample[turn] for sample in samples]
        summary[turn] = {
            **of_turn[0],
            "plain_seconds": statistics.median(sample["plain_seconds"] for sample in of_turn),
            "session_seconds": statistics.median(sample["session_seconds"] for sample in of_turn),
            "same_token": all(sample["same_token"] for sample in of_turn),
        }
    return summary


def render(result: dict[str, Any]) -> str:
    """A table with a line for each second turn."""
    lines = []
    for row in result["rows"]:
        first = row["first"]["plain_seconds"]
        for turn in TURNS[1:]:
            of_turn = row[turn]
            lines.append(
                [
                    f"{row['first']['prompt_tokens']:,}",
                    row["heads"],
                    turn,
                    f"{of_turn['prompt_tokens'] - of_turn['reused_tokens']:,}",
                    f"{first:.3f}",
                    f"{of_turn['plain_seconds']:.3f}",
                    f"{of_turn['session_seconds']:.3f}",
                    f"{of_turn['session_seconds'] / first:.3f}",
                    "yes" if of_turn["same_token"] else "no",
                ]
            )
    header = ["first turn, tokens", "heads", "second turn", "tokens that run", "first turn, s"]
    header += ["second, without session", "with session", "with session / first", "same token"]
    return markdown_table(header, lines)


if __name__ == "__main__":
    raise SystemExit(main())
