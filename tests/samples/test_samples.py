"""Samples are read as chat messages that can become prompts, and bad sources are named."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.errors import SampleError
from bsjax.samples import BENCHMARKS, QUESTIONS, read_samples
from bsjax.samples.content import interleave


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No test connects to the hub or writes to the user's cache of data sets."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        # Both libraries read their environment when they are imported, which was long ago.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("data_sets"))
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def picture(index: int) -> Image.Image:
    """A small image that differs from all others: its red value is its index."""
    pixels = np.zeros((30 + index % 3, 40, 3), np.uint8)
    pixels[...] = (index, 100, 200)
    return Image.fromarray(pixels)


def png(index: int) -> bytes:
    file = io.BytesIO()
    picture(index).save(file, "PNG")
    return file.getvalue()


def number_of(part: dict) -> int:
    """Which `picture` a content part holds."""
    if "base64" in part:
        image = Image.open(io.BytesIO(base64.b64decode(part["base64"])))
    else:
        image = Image.open(part.get("image") or part["path"])
    with image:
        return image.convert("RGB").getpixel((0, 0))[0]


def shape_of(sample: list[dict]) -> list:
    """A sample's content with images as their numbers."""
    assert [message["role"] for message in sample] == ["user"]
    return [
        part["text"] if part["type"] == "text" else number_of(part) for part in sample[0]["content"]
    ]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Eleven images in a folder and its sub-folders, and files that are not images."""
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(11):
        place = folder / ("deep/er" if index % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        picture(index).save(place / f"{index:02}.{'png' if index % 3 else 'PNG'}")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    picture(99).save(folder / ".hidden" / "99.png")
    return folder


def lines_file(folder: Path, *lines: object) -> Path:
    path = folder / "samples.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def user(*content: object) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def image(source: str, **more: object) -> dict:
    return {"type": "image", "image": source, **more}


# --- placeholders


def test_images_take_the_places_of_their_placeholders():
    first, second = image("a.png"), image("b.png")

    def text(value):
        return {"type": "text", "text": value}

    assert interleave("Compare <image> with <image>.", [first, second]) == [
        text("Compare "),
        first,
        text(" with "),
        second,
        text("."),
    ]
    assert interleave("<image><image>?", [first, second]) == [first, second, text("?")]
    assert interleave("Compare.", [first, second]) == [first, second, text("Compare.")]
    with pytest.raises(SampleError, match="3 <image> placeholders for 2 images"):
        interleave("<image> <image> <image>", [first, second])


# --- JSON Lines


def test_lines_are_conversations_with_paths_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    picture(7).save(tmp_path / "photos" / "seven.png")
    messages = [user(image("photos/seven.png", max_pixels=4096), "What is it?")]
    answered = [*messages, {"role": "assistant", "content": "A seven."}]
    openai = [user({"type": "image_url", "image_url": {"url": "photos/seven.png"}}, "?")]
    url = [user(image("https://example.org/a.png"), {"type": "image", "url": "data:,x"})]
    path = lines_file(
        tmp_path, messages, "", {"messages": answered, "id": 3}, openai, url, [user("Hi")]
    )
    monkeypatch.chdir("/")
    samples, description = read_samples(path)
    absolute = str(tmp_path / "photos" / "seven.png")
    expected = [user(image(absolute, max_pixels=4096), "What is it?")]
    assert samples[0] == samples[1] == expected
    assert samples[2][0]["content"][0]["image_url"] == {"url": absolute}
    assert samples[3] == url
    assert samples[4] == [user("Hi")]
    assert description == "samples.jsonl: 5 samples"


def test_a_list_of_images_fills_the_placeholders_of_texts(tmp_path):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image> or <image>?"},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "And <image>?"},
    ]
    names = ["0.png", "1.png", "2.png"]
    plain = [{"role": "user", "content": "Compare."}]
    path = lines_file(
        tmp_path, {"messages": turns, "images": names}, {"messages": plain, "images": names[1:]}
    )
    first, second = read_samples(path).messages
    assert first[0] == turns[0] and first[2] == turns[2]
    assert shape_of([first[1]]) == [0, " or ", 1, "?"]
    assert shape_of([first[3]]) == ["And ", 2, "?"]
    assert shape_of(second) == [1, 2, "Compare."]


def test_a_list_of_images_fills_image_parts_without_an_image(tmp_path):
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    empty = {"type": "image"}
    turns = [
        {"role": "system", "content": "Be brief."},
        user(empty, "or", {"type": "image", "max_pixels": 4096}, "?"),
        {"role": "assistant", "content": "The first."},
        user(image("2.png"), "And this?"),
    ]
    path = lines_file(tmp_path, {"messages": turns, "images": ["1.png", "0.png"]})
    (sample,) = read_samples(path).messages
    assert shape_of([sample[1]]) == [1, "or", 0, "?"]
    assert sample[1]["content"][2]["max_pixels"] == 4096
    assert shape_of([sample[3]]) == [2, "And this?"]


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (5, {}, "a path, a name or a list"),
        (None, {}, "a path, a name or a list"),
        ([5], {}, "a path, a name or a list"),
        (".", {"images_per_prompt": 5}, "must be a pair"),
        (".", {"pan_and_scan": "no"}, "pan_and_scan must be True or False"),
        (".", {"images_per_prompt": (1, 2, 3)}, "must be a pair"),
        (".", {"question": 5}, "must be a text"),
        (".", {"question": None}, "must be a text"),
    ],
)
def test_arguments_of_another_kind_are_refused(source, options, words, monkeypatch):
    # A user's program does not check annotations, as tests do.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(SampleError, match=words):
        read_samples(source, **options)


def test_base64_and_long_names_are_told_apart(tmp_path):
    long_name = "photos/" + "x" * 120 + ".png"
    (tmp_path / "photos").mkdir()
    picture(5).save(tmp_path / long_name)
    encoded = base64.b64encode(png(4)).decode()
    path = lines_file(tmp_path, [user(image(long_name), image(encoded))])
    (sample,) = read_samples(path).messages
    assert sample[0]["content"][0]["image"] == str(tmp_path / long_name)
    assert sample[0]["content"][1]["image"] == encoded


def test_a_limit_draws_by_the_seed_and_keeps_the_order(tmp_path):
    path = lines_file(tmp_path, *([user(f"{index}")] for index in range(50)))

    def numbers(**options):
        samples, description = read_samples(path, limit=8, **options)
        return [int(sample[0]["content"][0]["text"]) for sample in samples], description

    taken, description = numbers(seed=3)
    assert taken == sorted(set(taken)) and len(taken) == 8 and taken != list(range(8))
    assert numbers(seed=3) == (taken, description)
    assert numbers(seed=4)[0] != taken
    assert description == "samples.jsonl: 8 of 50 samples, seed 3"
    assert len(read_samples(path, limit=1000).messages) == 50


@pytest.mark.parametrize(
    ("lines", "number", "words"),
    [
        (['[{"role": "user", "content": "?"}]', '{"messages": ['], 2, "not JSON"),
        (["[", "1", "]"], 1, "jq -c"),
        (["{}"], 1, 'no list under "messages"'),
        (['{"messages": "hello"}'], 1, 'no list under "messages"'),
        (["3"], 1, "neither a list of messages nor an object"),
        (["[]"], 1, "no messages"),
        (['["hello"]'], 1, "neither a list of messages"),
        (["", '[{"role": "user"}]'], 2, "no 'content'"),
        (['[{"role": "assistant", "content": "Hi"}]'], 1, "no messages before the answer"),
        (['[{"role": "user", "content": [{"type": "image"}]}]'], 1, "without an image"),
        (['[{"role": "user", "content": [{"type": "video", "video": "a"}]}]'], 1, "video"),
        (['[{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]'], 1, "no.png"),
        (['[{"role": "user", "content": [{"type": "image", "image": "."}]}]'], 1, "as an image"),
        (['[{"role": "user", "content": [{"type": "image", "image": "a\\u0000"}]}]'], 1, "image"),
        (['[{"role": "user", "content": [{"type": "image", "path": "samples.jsonl"}]}]'], 1,
         "cannot be read as an image"),
        (['{"messages": [{"role": "user", "content": "<image>?"}], "images": []}'], 1,
         "1 <image> placeholders and 0 images"),
        (['{"messages": [{"role": "user", "content": "<image>?"}], "images": "a.png"}'], 1,
         '"images" must be a list'),
        (['{"messages": [{"role": "user", "content": "?"}], "images": [3]}'], 1, "got 3"),
        (['{"messages": [{"role": "user", "content": []}], "images": ["a.png"]}'], 1,
         '0 parts of type "image" without an image and 1 images'),
        (['{"messages": [{"role": "user", "content": 3}], "images": ["a.png"]}'], 1,
         "content of its messages must be text"),
        (['[{"role": "user", "content": [{"type": "image", "image": 5}]}]'], 1, "image 5 is no"),
        (['[{"role": ["user"], "content": "?"}]'], 1, "['role'] must be text"),
        (['{"messages": [{"role": "system", "content": "?"}], "images": ["a.png"]}'], 1,
         "no message by the user"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, lines, number, words):
    path = lines_file(tmp_path, *lines)
    with pytest.raises(SampleError) as caught:
        read_samples(path)
    assert f"{path}, line {number}" in str(caught.value)
    assert words in str(caught.value)


def test_files_that_hold_no_samples_are_refused(tmp_path):
    for content, words in (
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (png(3), "line 1 is not text in UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ):
        path = tmp_path / "samples.jsonl"
        path.write_bytes(content)
        with pytest.raises(SampleError, match=words):
            read_samples(path)
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps([user("Hi")]).encode() + b"\r\n")
    assert read_samples(marked).messages == [[user("Hi")]]


# --- folders of images


def test_a_folder_shows_each_image_about_once(photographs):
    samples, description = read_samples(photographs, images_per_prompt=(2, 4), seed=5)
    shown = [shape_of(sample) for sample in samples]
    numbers = [entry for sample in shown for entry in sample[:-1]]
    assert set(numbers) == set(range(11))
    assert len(numbers) < 11 + 4
    for sample in shown:
        assert 2 <= len(sample) - 1 <= 4
        assert len(set(sample[:-1])) == len(sample) - 1, "an image occurs twice in a prompt"
        assert sample[-1] in QUESTIONS
    assert f"{len(samples)} prompts of 2 to 4 of the 11 images" in description
    assert photographs.name in description and "seed 5" in description


def test_prompts_of_a_folder_depend_on_the_seed_and_not_on_its_path(photographs, tmp_path):
    def shown(folder, seed):
        samples = read_samples(folder, limit=20, seed=seed, question="What?").messages
        return [shape_of(sample) for sample in samples]

    first = shown(photographs, 0)
    assert len(first) == 20
    assert {len(sample) - 1 for sample in first} >= {2, 5, 11}
    assert all(sample[-1] == "What?" for sample in first)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(photographs, target_is_directory=True)
    assert shown(photographs, 0) == first == shown(elsewhere, 0)
    assert shown(photographs, 1) != first
    # Every image is used once before any is used twice.
    assert sorted([n for sample in first for n in sample[:-1]][:11]) == list(range(11))


def test_a_folder_without_enough_images_is_refused(tmp_path, photographs):
    with pytest.raises(SampleError, match="has 0 images.*a prompt needs 2"):
        read_samples(tmp_path)
    picture(1).save(tmp_path / "one.png")
    with pytest.raises(SampleError, match="has 1 image .*a prompt needs 2"):
        read_samples(tmp_path)
    assert len(read_samples(tmp_path, images_per_prompt=(1, 5)).messages) == 1
    (tmp_path / "two.jpg").write_bytes(b"this is no image")
    with pytest.raises(SampleError, match="two.jpg cannot be read as an image"):
        read_samples(tmp_path)
    for options, words in (
        ({"images_per_prompt": (0, 3)}, "at least 1"),
        ({"images_per_prompt": (4, 3)}, "below the smallest"),
        ({"question": []}, "must be a text"),
        ({"question": " "}, "must be a text"),
        ({"question": "<image> or <image>?", "images_per_prompt": (3, 3)}, "does not fit prompts"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_pixels": 0}, "max_pixels must be at least 1"),
    ):
        with pytest.raises(SampleError, match=words):
            read_samples(photographs, **options)


def test_sources_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(SampleError, match="no file or folder .*nowhere"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(SampleError, match="Do you mean benchmark:blink"):
        read_samples("BLINK")
    for name in ("~nobody/samples", "x" * 5000, "a\0b", "benchmark.jsonl"):
        with pytest.raises(SampleError, match="no file or folder"):
            read_samples(name)
    with pytest.raises(SampleError, match="no source"):
        read_samples([])


def test_several_sources_are_read_together(photographs, tmp_path):
    path = lines_file(tmp_path, [user("Hi")])
    samples, description = read_samples(
        [path, photographs], limit=3, max_pixels=5000, pan_and_scan=True
    )
    assert len(samples) == 4
    assert samples[0] == [user("Hi")]
    images = [part for part in samples[1][0]["content"] if part["type"] == "image"]
    assert images and all(part["max_pixels"] == 5000 for part in images)
    assert all(part["do_pan_and_scan"] is True for part in images)
    assert description.startswith("samples.jsonl: 1 sample; 3 prompts of")


def test_every_kind_of_source_can_become_a_prompt(photographs, tmp_path, tiny_source):
    from bsjax.checkpoint.loading import read_processor

    processor = read_processor(tiny_source)
    picture(0).save(tmp_path / "a.png")
    path = lines_file(tmp_path, [user("Is", image("a.png"), "dark?")])
    sources = [path, photographs, f"benchmark:muirbench@{muirbench(tmp_path)}"]
    for sample in read_samples(sources, limit=2).messages:
        prompt = processor.prompt(sample)
        images = sum(part["type"] == "image" for part in sample[0]["content"])
        assert len(prompt.image_tokens) == images >= 1


# --- benchmarks, in the hub's layouts


def write_card(folder: Path, split: str, configurations: dict[str, str]) -> None:
    """Writes the README in which a data set says which files belong to which configuration."""
    entries = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {path}\n"
        for name, path in configurations.items()
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n")


def write_table(path: Path, columns: dict[str, list], features: dict) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(path))


def muirbench(folder: Path) -> Path:
    """Four rows in the columns of MUIRBENCH/MUIRBENCH; the last has a placeholder too many."""
    import datasets

    folder = folder / "muirbench"
    text = datasets.Value("string")
    columns = {
        "idx": ["0", "1", "2", "3"],
        "task": ["Counting", "Visual Retrieval", "Ordering", "Counting"],
        "image_relation": ["Independent"] * 4,
        "image_type": ["photography"] * 4,
        "question": ["<image>\nHow many?<image>", "Like <image>?", "What is first?", "<image>?"],
        "options": [["one", "two"], ["<image>", "<image>", "None"], ["a", "b"], ["<image>"]],
        "answer": ["A", "B", "A", "A"],
        "image_list": [[picture(0), picture(1)], [picture(2), picture(3), picture(4)],
                       [picture(5), picture(6)], [picture(7)]],
        "counterpart_idx": ["", "", "", ""],
    }  # fmt: skip
    features = {
        name: text if name not in ("options", "image_list") else datasets.List(text)
        for name in columns
    } | {"image_list": datasets.List(datasets.Image())}
    write_table(folder / "data" / "test-00000-of-00001.parquet", columns, features)
    write_card(folder, "test", {"default": "data/test-*"})
    return folder


def blink(folder: Path) -> Path:
    """Two tasks in the columns of BLINK-Benchmark/BLINK."""
    import datasets

    folder = folder / "blink"
    for start, task in ((10, "Jigsaw"), (20, "Counting")):
        columns = {
            "idx": [f"val_{task}_1", f"val_{task}_2"],
            "question": ["short", "short"],
            "sub_task": [task] * 2,
            "image_1": [picture(start), picture(start + 3)],
            "image_2": [picture(start + 1), None],
            "image_3": [picture(start + 2), None],
            "image_4": [None, None],
            "choices": [["a", "b"]] * 2,
            "answer": ["(A)", "(B)"],
            "prompt": [f"{task}: which?\n(A) a\n(B) b", f"{task}: how many?"],
        }
        features = {name: datasets.Value("string") for name in columns}
        features |= {f"image_{index}": datasets.Image() for index in range(1, 5)}
        features |= {"choices": datasets.List(datasets.Value("string"))}
        write_table(folder / task / "val-00000-of-00001.parquet", columns, features)
    write_card(folder, "val", {task: f"{task}/val-*" for task in ("Jigsaw", "Counting")})
    return folder


def mmiu(folder: Path, *, zipped: str) -> Path:
    """Two rows in the columns of FanqingM/MMIU-Benchmark, images in zip files or unpacked."""
    import datasets

    folder = folder / f"mmiu_{zipped}"
    group, task = "Low-level-semantic", "forensic_detection_blink"
    names = [[f"./{group}/{task}/{task}_{row}_{index}.jpg" for index in range(2)] for row in (0, 1)]
    options = "A: the first image\nB: the second image"
    columns = {
        "task": [task] * 2,
        "visual_input_component": ["natural image"] * 2,
        "source": ["blink"] * 2,
        "options": [options] * 2,
        "question": ["Which is a photograph?"] * 2,
        "context": [f"You are a judge. Select from the following choices.\n{options}\n", None],
        "input_image_path": names,
        "output": ["A", "B"],
    }
    features = {name: datasets.Value("string") for name in columns}
    features |= {"input_image_path": datasets.List(datasets.Value("string"))}
    write_table(folder / "all.parquet", columns, features)
    write_card(folder, "test", {"default": "all.parquet"})
    files = {name.removeprefix("./"): png(30 + i) for i, name in enumerate(sum(names, []))}
    if zipped == "no":
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder
    with zipfile.ZipFile(folder / f"{group}.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name if zipped == "with_folder" else name.split("/", 1)[1], data)
    return folder


def test_muirbench_rows_become_questions(tmp_path):
    folder = muirbench(tmp_path)
    samples, description = read_samples(f"benchmark:muirbench@{folder}")
    answer = "Answer with the letter of the option."
    assert [shape_of(sample) for sample in samples] == [
        [0, "\nHow many?", 1, f"\n(A) one\n(B) two\n{answer}"],
        ["Like ", 2, "?\n(A) ", 3, "\n(B) ", 4, f"\n(C) None\n{answer}"],
        [5, 6, f"What is first?\n(A) a\n(B) b\n{answer}"],
    ]
    assert description == (
        "muirbench, MUIRBENCH/MUIRBENCH, split test: 3 of 4 rows, seed 0, 1 left out for a wrong "
        "number of placeholders"
    )
    drawn = read_samples(f"benchmark:MuirBench@{folder}", limit=2, seed=1).messages
    assert len(drawn) == 2 and all(sample in samples for sample in drawn)


def test_blink_has_one_table_per_task(tmp_path, monkeypatch):
    folder = blink(tmp_path)
    samples, description = read_samples(f"benchmark:blink/Jigsaw@{folder}")
    assert [shape_of(sample) for sample in samples] == [
        [10, 11, 12, "Jigsaw: which?\n(A) a\n(B) b"],
        [13, "Jigsaw: how many?"],
    ]
    assert description == "blink/Jigsaw, BLINK-Benchmark/BLINK, split val: 2 rows"
    both = dataclasses.replace(BENCHMARKS["blink"], tasks=("Counting", "Jigsaw"))
    monkeypatch.setitem(BENCHMARKS, "blink", both)
    everything = read_samples(f"benchmark:blink@{folder}").messages
    assert [shape_of(sample)[0] for sample in everything] == [20, 23, 10, 13]


@pytest.mark.parametrize("zipped", ["no", "with_folder", "without_folder"])
def test_mmiu_images_come_from_files_or_zip_files(tmp_path, zipped):
    folder = mmiu(tmp_path, zipped=zipped)
    samples = read_samples(f"benchmark:mmiu@{folder}").messages
    options = "A: the first image\nB: the second image\nAnswer with the letter of the option."
    assert [shape_of(sample) for sample in samples] == [
        [30, 31, f"Which is a photograph?\nYou are a judge. Select from the following choices.\n"
                 f"{options}"],
        [32, 33, f"Which is a photograph?\n{options}"],
    ]  # fmt: skip


def test_zip_files_are_fetched_from_the_hub(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    folder = mmiu(tmp_path, zipped="with_folder")
    load = datasets.load_dataset
    fetched = []

    def fetch(repository, name, *, repo_type):
        fetched.append((repository, name, repo_type))
        return str(folder / name)

    monkeypatch.setattr(
        datasets, "load_dataset", lambda where, *rest, **more: load(str(folder), *rest, **more)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert len(read_samples("benchmark:mmiu").messages) == 2
    assert fetched == [("FanqingM/MMIU-Benchmark", "Low-level-semantic.zip", "dataset")]


def test_bad_benchmarks_are_refused(tmp_path, monkeypatch):
    folder = muirbench(tmp_path)
    for source, words in (
        ("benchmark:mmmu", "no benchmark 'mmmu': bsjax knows muirbench, mmiu, blink"),
        ("benchmark:", "no benchmark ''"),
        ("benchmark:blink/Chess", "no task 'Chess': its tasks are Art_Style"),
        ("benchmark:muirbench/Counting", "it has none"),
        (f"benchmark:muirbench@{tmp_path}/none", "no folder"),
        (f"benchmark:blink/Jigsaw@{folder}", "cannot be loaded"),
        (f"benchmark:mmiu@{folder}", "no column context, input_image_path; it has idx, task"),
        (f"benchmark:muirbench@{tmp_path / 'empty'}", "hf download MUIRBENCH/MUIRBENCH"),
        ("benchmark:muirbench", "hf download MUIRBENCH/MUIRBENCH"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SampleError, match=words):
            read_samples(source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SampleError, match=r"pip install datasets .*bsjax\[datasets\]"):
        read_samples("benchmark:blink")


def test_missing_images_of_a_benchmark_are_named(tmp_path):
    folder = mmiu(tmp_path, zipped="with_folder")
    path = folder / "Low-level-semantic.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.jpg", b"")
    with pytest.raises(SampleError, match="Low-level-semantic.zip has no image Low-level"):
        read_samples(f"benchmark:mmiu@{folder}")
    path.write_bytes(b"not a zip file")
    with pytest.raises(SampleError, match="Low-level-semantic.zip of FanqingM"):
        read_samples(f"benchmark:mmiu@{folder}")
    path.unlink()
    with pytest.raises(SampleError, match="Low-level-semantic.zip"):
        read_samples(f"benchmark:mmiu@{folder}")


@pytest.mark.slow
def test_files_and_folders_need_no_datasets_library(photographs):
    program = (
        "import sys; sys.modules['datasets'] = sys.modules['torch'] = None\n"
        f"import bsjax; print(len(bsjax.read_samples({str(photographs)!r}, limit=3).messages))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout == "3\n", done.stderr
    assert bsjax.read_samples is read_samples
