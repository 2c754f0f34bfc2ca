"""Random histories of a conversation: turns, edits, images that come and go."""

from typing import Any

import numpy as np
from PIL import Image

SIZES = ((56, 84), (84, 56), (28, 28), (84, 112))


def picture(number: int) -> Image.Image:
    """One of many pictures of a few sizes: number n and n + 4 have the same size."""
    shape = (*SIZES[number % len(SIZES)], 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


class History:
    """A conversation that changes from step to step.

    Args:
      random: makes all choices.
      words: the words that messages are made of.
      most_turns: how many turns there are at most.
    """

    def __init__(self, random: np.random.Generator, words: list[str], most_turns: int = 4) -> None:
        self._random, self._words, self._most_turns = random, words, most_turns
        self._turns = [[self._question(images=True), None]]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Chat messages, up to the last question."""
        messages = []
        for question, answer in self._turns:
            content = [
                {"type": "image", "image": picture(part)} if isinstance(part, int) else _text(part)
                for part in question
            ]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [_text(answer)]})
        return messages

    def change(self, answer: str, step: str | None = None) -> str:
        """Goes on to another conversation that has something in common with this one.

        Args:
          answer: the answer to the last question.
          step: what to do; by default anything.

        Returns:
          What was done.
        """
        turns, random = self._turns, self._random
        others = ["again", "edit", "swap", "undo", "forget"]
        step = step or random.choice(["ask"] * 3 + ["show"] * 2 + others)
        if step in ("ask", "show") and len(turns) == self._most_turns:
            step = "undo"
        match step:
            case "ask" | "show":
                # Any answer will do: the caller may have changed it. A space keeps it apart from
                # the question where the chat template has nothing between them.
                kept = answer.strip() and random.random() < 0.7
                turns[-1][1] = f" {answer}" if kept else self._some()
                turns.append([self._question(images=step == "show"), None])
            case "edit":
                question, _ = turns[random.integers(len(turns))]
                question[-1] = self._some()
            case "swap":
                places = [
                    (question, index)
                    for question, _ in turns
                    for index, part in enumerate(question)
                    if isinstance(part, int)
                ]
                question, index = places[random.integers(len(places))]
                question[index] += len(SIZES)
            case "undo":
                del turns[random.integers(1, len(turns) + 1) :]
                turns[-1][1] = None
            case "forget":
                turns[:] = [[self._question(images=True), None]]
        return step

    def _question(self, *, images: bool) -> list[str | int]:
        """Texts and numbers of pictures."""
        count = self._random.integers(1, 4) if images else 0
        parts: list[str | int] = []
        for number in self._random.integers(0, 40, count).tolist():
            if self._random.random() < 0.5:
                parts.append(self._some())
            parts.append(number)
        return [*parts, self._some()]

    def _some(self) -> str:
        return " ".join(self._random.choice(self._words, self._random.integers(1, 12)))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
