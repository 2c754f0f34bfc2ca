"""Kills runs of the converter, of profiling, of sessions, batches and training while they write.

    python -m tools.kill_runs [--convert 20] [--profile 10] [--session 50] [--batch 30] [--tower 5]
                              [--model 5]

Training has two stages: `--tower` kills it while it trains the vision tower alone, `--model` while
it trains the whole model. Every run is killed (SIGKILL) at a random moment after it has begun to
write. Afterwards its result must be absent, or complete and valid. The next run must clean up and
continue, and the last run, which is not killed, must give the result of a run that was never
interrupted. Takes about 50 minutes on two cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoConfig

from bsjax.checkpoint.loading import load
from bsjax.checkpoint.manifest import verify_manifest
from bsjax.models import FAMILIES
from bsjax.profiles.profile import Profile
from bsjax.runtime.session import Session
from examples.train_small_vlm.export import huggingface_tensors

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-qwen2.5-vl"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.kill_runs", description=__doc__)
    parser.add_argument("--convert", type=int, default=20, metavar="N", help="kills of convert")
    parser.add_argument("--profile", type=int, default=10, metavar="N", help="kills of profiling")
    parser.add_argument("--session", type=int, default=50, metavar="N", help="kills of saving")
    parser.add_argument("--batch", type=int, default=30, metavar="N", help="kills of batches")
    parser.add_argument("--tower", type=int, default=5, metavar="N", help="kills of stage one")
    parser.add_argument("--model", type=int, default=5, metavar="N", help="kills of stage two")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        for count, kill in (
            (options.convert, kill_convert),
            (options.profile, kill_profile),
            (options.session, kill_session),
            (options.batch, kill_batch),
            (options.tower, kill_tower_training),
            (options.model, kill_model_training),
        ):
            if count:
                kill(Path(folder), count, chance)


def kill_convert(folder: Path, count: int, chance: random.Random) -> None:
    """Kills conversions: no destination may appear, and the next run must remove what is left."""
    source, destination = folder / "large", folder / "converted"
    write_large_source(source)
    command = [sys.executable, "-m", "convert", str(source), str(destination), "--quiet"]

    def left() -> list[Path]:
        return sorted(folder.glob("converted.converting-*"))

    started = time.monotonic()
    total, writing = run_whole(command, lambda: size_of(left()) > 0)
    verify_manifest(destination)
    complete = size_of([destination])
    shutil.rmtree(destination)
    print(f"convert: {complete:,} bytes; whole run {total:.1f} s, of it {writing:.1f} s writing")
    finished, seen = 0, []
    for _ in range(count):
        before, share = left(), chance.uniform(0, 1)

        def writes(before: list[Path] = before, share: float = share) -> bool:
            new = [folder for folder in left() if folder not in before]
            return size_of(new) > share * complete

        killed = run_killed(command, writes, 0)
        kept = left()
        assert not set(before) & set(kept), "the next run did not remove what a killed one left"
        if destination.exists():
            verify_manifest(destination)
            load(destination)
            finished += 1
            shutil.rmtree(destination)
        else:
            assert len(kept) == 1 and killed
            seen.append(size_of(kept) / complete)
    run_whole(command, lambda: True)
    assert not left(), "a whole run left something behind"
    verify_manifest(destination)
    load(destination)
    shares = ", ".join(f"{share:.0%}" for share in sorted(seen))
    print(f"convert: {len(seen)} killed mid-write, with {shares} written; {finished} had finished")
    print(f"convert: every later run cleaned up; {time.monotonic() - started:.0f} s")


def kill_profile(folder: Path, count: int, chance: random.Random) -> None:
    """Kills profiling: with `--resume`, the result is that of a run that was never killed."""
    checkpoint, photos = folder / "tiny", folder / "photos"
    command = [sys.executable, "-m", "convert", str(TINY), str(checkpoint), "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT)
    photos.mkdir()
    for number in range(24):
        Image.effect_noise((56, 84), 40 + 5 * number).convert("RGB").save(photos / f"{number}.png")

    def command_of(name: str) -> list[str]:
        of_run = [
            "--resume",
            str(folder / f"{name}.state"),
            "--output",
            str(folder / f"{name}.json"),
        ]
        fixed = ["--limit", "16", "--target-reduction", "0.1", "--refine", "--answer-tokens", "2"]
        run = [sys.executable, "-m", "bsjax", "profile", str(checkpoint), str(photos)]
        return [*run, *fixed, *of_run]

    started = time.monotonic()
    run_whole(command_of("whole"), lambda: True)
    expected = json.loads((folder / "whole.json").read_text())
    # Once more, with the compiled programs of the first run in JAX's persistent cache.
    total, writing = run_whole(command_of("again"), lambda: size_of([folder / "again.state"]) > 0)
    assert json.loads((folder / "again.json").read_text()) == expected
    print(f"profile: whole run {total:.1f} s, of it {writing:.1f} s measuring")
    killed, sizes, result = 0, [], folder / "killed.json"
    for _ in range(count):
        before = size_of([folder / "killed.state"])
        killed += run_killed(
            command_of("killed"),
            lambda before=before: size_of([folder / "killed.state"]) > before,
            chance.uniform(0, 1.5 * writing / count),
        )
        sizes.append(size_of([folder / "killed.state"]))
        if result.exists():
            break
    if result.exists():
        assert Profile.load(result).from_data
    run_whole(command_of("killed"), lambda: True)
    assert json.loads((folder / "killed.json").read_text()) == expected, "another profile came out"
    assert not list(folder.glob(".killed.*")), "a temporary file stayed"
    print(f"profile: {killed} killed, with state files of {sizes} bytes")
    print("profile: the last run gave the same profile as one that was never killed")
    print(f"profile: {time.monotonic() - started:.0f} s")


# Saves two conversations in turn, to one file, until it is killed.
_SAVING = """
import itertools, sys
import bsjax
model = bsjax.load(sys.argv[1])
sessions = [bsjax.Session.load(path, model) for path in sys.argv[2:4]]
for session in itertools.cycle(sessions):
    session.save(sys.argv[4])
"""


def kill_session(folder: Path, count: int, chance: random.Random) -> None:
    """Kills saving: the file is always that of one of the conversations, whole."""
    checkpoint, path = folder / "tiny of sessions", folder / "saved" / "a.session"
    command = [sys.executable, "-m", "convert", str(TINY), str(checkpoint), "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT)
    path.parent.mkdir()
    model = load(checkpoint)
    wholes = [folder / "first.session", folder / "second.session"]
    session = Session(model, max_tokens=16384)
    for number, whole in enumerate(wholes):
        text = f"{number} is a number, " * 2000
        session.generate([{"role": "user", "content": text}], max_new_tokens=1)
        began = time.monotonic()
        session.save(whole)
        saving = time.monotonic() - began
    contents = [whole.read_bytes() for whole in wholes]
    assert contents[0] != contents[1]
    command = [sys.executable, "-c", _SAVING, str(checkpoint), *map(str, wholes), str(path)]
    print(f"session: {len(contents[0]):,} bytes; saving takes {saving:.2f} s")
    started, absent, left_over = time.monotonic(), 0, 0
    for _ in range(count):
        before = set(path.parent.iterdir())

        def writes(before: set[Path] = before) -> bool:
            return bool(set(path.parent.iterdir()) - before - {path})

        assert run_killed(command, writes, chance.uniform(0, 3 * saving))
        left = set(path.parent.iterdir()) - {path}
        assert not left & before, "the next run did not remove what a killed one left"
        left_over += len(left)
        if path.exists():
            assert path.read_bytes() in contents, "a session is torn"
            assert Session.load(path, model).tokens
            # As often as not, the next run is killed before it has written its first file.
            if chance.random() < 0.5:
                path.unlink()
        else:
            absent += 1
    print(
        f"session: {count} killed, {left_over} in the middle of a file, {absent} before the first"
    )
    print(f"session: no file was torn; {time.monotonic() - started:.0f} s")


def kill_batch(folder: Path, count: int, chance: random.Random) -> None:
    """Kills batches: no answer is lost, torn or written twice, and the last run completes them."""
    checkpoint, questions = folder / "tiny of batches", folder / "questions.jsonl"
    command = [sys.executable, "-m", "convert", str(TINY), str(checkpoint), "--quiet"]
    subprocess.run(command, check=True, cwd=ROOT)
    Image.effect_noise((84, 56), 60).convert("RGB").save(folder / "noise.png")
    part = {"type": "image", "image": "noise.png"}
    conversations = 20 * count
    with questions.open("w") as file:
        for number in range(conversations):
            content = [*[part] * (number % 3), {"type": "text", "text": f"{number} is? " * 5}]
            file.write(json.dumps([{"role": "user", "content": content}]) + "\n")

    def command_of(path: Path) -> list[str]:
        run = [sys.executable, "-m", "bsjax", "generate", str(checkpoint)]
        # Answers of many lengths, which do not end together.
        drawn = ["--temperature", "1", "--stop", "e", "--max-new-tokens", "64"]
        return [*run, "--batch", str(questions), "--output", str(path), *drawn]

    def answers(path: Path) -> list[list[int]]:
        """The tokens of all answers, each of which is there once."""
        header, *lines = map(json.loads, path.read_text().splitlines())
        assert header["bsjax_batch"] == 1
        by_line = {line["line"]: line["token_ids"] for line in lines}
        assert len(by_line) == len(lines) == conversations
        return [by_line[number + 1] for number in range(conversations)]

    started = time.monotonic()
    whole, killed = folder / "whole.jsonl", folder / "killed.jsonl"
    run_whole(command_of(whole), lambda: True)
    # Once more, with the compiled programs of the first run in JAX's persistent cache.
    again = folder / "again.jsonl"
    _, writing = run_whole(command_of(again), lambda: again.exists() and b"}\n" in whole_of(again))
    expected = answers(whole)
    assert answers(again) == expected
    print(f"batch: {conversations} conversations; {writing:.1f} s from the first line to the end")
    kills = torn = cut = 0
    seen = []
    for _ in range(count):
        before = whole_of(killed)
        kept = before[: before.rfind(b"\n") + 1]
        lines = kept.count(b"\n")
        kills += run_killed(
            command_of(killed),
            lambda lines=lines: whole_of(killed).count(b"\n") > lines,
            chance.uniform(0, 0.7 * writing / count),
        )
        content = whole_of(killed)
        # A header without an answer may be written anew.
        assert content.startswith(kept) or lines < 2, "what was written has changed"
        torn += not content.endswith(b"\n")
        seen.append(max(content.count(b"\n") - 1, 0))
        if content.count(b"\n") > 2 and chance.random() < 0.5:
            # As a machine that lost power may leave it: the last line without its end.
            last = content[:-1].rfind(b"\n") + 1
            killed.write_bytes(content[: chance.randrange(last + 1, len(content))])
            cut += 1
    run_whole(command_of(killed), lambda: True)
    assert answers(killed) == expected, "other answers came out"
    print(f"batch: {kills} killed, with {seen} answers written; {torn} left a torn line,")
    print(f"batch: and {cut} whole ones were cut by hand. Every answer is there once, as if never")
    print(f"batch: killed; {time.monotonic() - started:.0f} s")


def whole_of(path: Path) -> bytes:
    """The content of a file; nothing if there is none."""
    return path.read_bytes() if path.exists() else b""


def kill_tower_training(folder: Path, count: int, chance: random.Random) -> None:
    """Kills training of the vision tower: it continues from its last checkpoint."""
    run, steps = folder / "run", 1000
    command = [sys.executable, "-m", "examples.train_small_vlm", str(run), "--tower-steps",
               str(steps), "--steps", "1"]  # fmt: skip
    started = time.monotonic()
    log = run / "tower" / "log.jsonl"
    reached = []
    for _ in range(count):
        lines = size_of([log])
        run_killed(command, lambda lines=lines: size_of([log]) > lines, chance.uniform(0, 20))
        reached.append(json.loads(log.read_text().splitlines()[-1])["step"])
    # Half a line, as a machine that lost power leaves it, and no settings.
    with log.open("a") as file:
        file.write('{"step": 7, "seco')
    (run / "settings.json").write_text("")
    lines = size_of([log])
    run_killed(command, lambda: size_of([log]) > lines, 0)
    steps_logged = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps_logged == list(range(50, steps_logged[-1] + 1, 50)), steps_logged
    assert json.loads((run / "settings.json").read_text())["tower_steps"] == steps
    print(f"tower: killed {count} times, at the steps {reached}; then with a torn log and empty")
    print(f"tower: settings; the log is whole to step {steps_logged[-1]}; "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip


def kill_model_training(folder: Path, count: int, chance: random.Random) -> None:
    """Kills training of the whole model: log and weights are those of a run never killed."""
    # With this seed, all batches of this many steps have the same shapes: there is one program.
    steps, seed = 7, 141

    def command_of(name: str) -> list[str]:
        run = [sys.executable, "-m", "examples.train_small_vlm", str(folder / name)]
        fixed = ["--tower-steps", "1", "--steps", str(steps), "--seed", str(seed)]
        return [*run, *fixed, "--log-every", "1", "--save-every", "1"]

    def written(name: str) -> int:
        return size_of([folder / name / "model"])

    def logged(name: str) -> list[dict]:
        log = folder / name / "model" / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [json.loads(line) | {"seconds": 0} for line in lines]

    def weights(name: str) -> bytes:
        return (folder / name / "checkpoint" / "model.safetensors").read_bytes()

    started = time.monotonic()
    run_whole(command_of("first"), lambda: True)
    # Once more, with the compiled programs of the first run in JAX's persistent cache.
    total, writing = run_whole(command_of("again"), lambda: written("again") > 0)
    expected = logged("first"), weights("first")
    assert (logged("again"), weights("again")) == expected
    print(f"model: whole run {total:.1f} s, of it {writing:.1f} s writing")
    killed, reached = 0, []
    for _ in range(count):
        before = written("stopped")
        killed += run_killed(
            command_of("stopped"),
            lambda before=before: written("stopped") > before,
            chance.uniform(0, writing / count),
        )
        reached.append(len(logged("stopped")))
        if (folder / "stopped" / "checkpoint").exists():
            assert weights("stopped") == expected[1], "a checkpoint is torn"
            break
    run_whole(command_of("stopped"), lambda: True)
    assert (logged("stopped"), weights("stopped")) == expected, "another model came out"
    assert not list((folder / "stopped").glob(".checkpoint.*")), "a temporary folder stayed"
    print(
        f"model: {killed} killed, after {reached} of {steps} steps; the last run gave the log and"
    )
    print(f"model: weights of one that was never killed; {time.monotonic() - started:.0f} s")


def run_killed(command: list[str], writes: Callable[[], bool], wait: float) -> bool:
    """Runs a command, and kills it `wait` seconds after it begins to write.

    Returns:
      Whether it was killed; False if it ended before.
    """
    process = start(command)
    while not writes() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(wait)
    ended = process.poll() is not None
    # The group: what it started is killed with it.
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def run_whole(command: list[str], writes: Callable[[], bool]) -> tuple[float, float]:
    """Runs a command to its end; seconds in all, and since it began to write."""
    started = time.monotonic()
    process = start(command)
    while not writes() and process.poll() is None:
        time.sleep(0.01)
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return time.monotonic() - started, time.monotonic() - began


def start(command: list[str]) -> subprocess.Popen:
    """Starts a command in a group of its own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def size_of(paths: list[Path]) -> int:
    """Bytes of files and folders; those that disappear meanwhile count as empty."""
    total = 0
    for path in paths:
        inside = [Path(parent, name) for parent, _, names in os.walk(path) for name in names]
        for file in [path, *inside]:
            try:
                total += 0 if file.is_dir() else file.stat().st_size
            except OSError:
                continue
    return total


def write_large_source(folder: Path) -> None:
    """Writes the tiny checkpoint with layers so large that converting it takes seconds."""
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = AutoConfig.from_pretrained(TINY)
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.intermediate_size = 1024, 16, 16384
    config.vision_config.out_hidden_size = text.hidden_size
    config.save_pretrained(folder)
    module = FAMILIES[config.model_type].build(config, jnp.bfloat16)
    tensors = huggingface_tensors(nnx.state(module), config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
