"""Samples from multi-image benchmarks on the Hugging Face Hub, through the `datasets` library.

The benchmarks, as they are on the hub:

    MuirBench   MUIRBENCH/MUIRBENCH (arXiv 2406.09411), split test: `question` and `options` with
                <image> placeholders, `image_list`
    MMIU        FanqingM/MMIU-Benchmark (arXiv 2408.02718), split test: `question`, `context`,
                `options` in one text, `input_image_path`; the images are in seven zip files
    BLINK       BLINK-Benchmark/BLINK (arXiv 2404.12390), split val, one configuration per task:
                `prompt`, `image_1` to `image_4`

Only questions and images are used, never the answers.
"""

import base64
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bsjax.errors import SampleError
from bsjax.samples.content import check_sample, interleave, share_in_words

_ANSWER = "Answer with the letter of the option."
_INSTALL = (
    "Benchmarks are read with the `datasets` library, which is not installed: pip install datasets "
    "(or bsjax[datasets])."
)


class _UnfitRow(Exception):
    """A row whose placeholders and images do not match."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is on the hub, and how one of its rows becomes a question."""

    repository: str
    split: str
    columns: tuple[str, ...]
    """The columns to read."""
    images: tuple[str, ...]
    """Those of the columns that hold encoded images, or lists of them."""
    content: Callable[[Mapping[str, Any], "_Archives"], list[dict[str, Any]]]
    """Makes a message's content from a row."""
    tasks: tuple[str, ...] = ()
    """Names of configurations on the hub; empty if there is only one."""


def read_benchmark(
    text: str, limit: int | None, seed: int
) -> tuple[list[list[dict[str, Any]]], str]:
    """Reads a benchmark; see `bsjax.samples.read_samples`.

    Rows with different numbers of placeholders and images are left out; the description says how
    many there are.

    Args:
      text: NAME, NAME/TASK, NAME@FOLDER or NAME/TASK@FOLDER.
      limit: largest number of rows.
      seed: seed of the draw.

    Raises:
      SampleError: the name or task is unknown, the `datasets` library is not installed, or the data
        cannot be loaded or has unexpected columns.
    """
    name, folder = _split_folder(text)
    name, _, task = name.partition("/")
    benchmark = BENCHMARKS.get(name.lower())
    if benchmark is None:
        raise SampleError(
            f"There is no benchmark {name!r}: bsjax knows {', '.join(BENCHMARKS)}. Other data "
            "comes in as a JSON Lines file or a folder of images."
        )
    if task and task not in benchmark.tasks:
        known = f"its tasks are {', '.join(benchmark.tasks)}" if benchmark.tasks else "it has none"
        raise SampleError(f"The benchmark {name} has no task {task!r}: {known}.")
    where = str(folder) if folder is not None else benchmark.repository
    tables = [
        _load(benchmark, where, one) for one in ((task,) if task else benchmark.tasks or ("",))
    ]
    rows = [(table, index) for table in tables for index in range(len(table))]
    samples, taken, unfit = [], [], 0
    known_files: set[Path] = set()
    with _Archives(benchmark, folder) as archives:
        for number in np.random.default_rng(seed).permutation(len(rows)).tolist():
            if len(taken) == limit:
                break
            table, index = rows[number]
            try:
                content = benchmark.content(table[index], archives)
            except _UnfitRow:
                unfit += 1
                continue
            sample = [{"role": "user", "content": content}]
            check_sample(sample, f"{where}, row {index}", known_files)
            samples.append(sample)
            taken.append(number)
    if not samples:
        raise SampleError(f"{where} has no rows that can be used ({len(rows)} in all).")
    order = np.argsort(taken).tolist()
    left_out = f", {unfit} left out for a wrong number of placeholders" if unfit else ""
    return [samples[index] for index in order], (
        f"{name.lower()}{'/' * bool(task)}{task}, {benchmark.repository}{_revision(tables[0])}, "
        f"split {benchmark.split}: {share_in_words(len(taken), len(rows), 'row', seed)}{left_out}"
    )


def _split_folder(text: str) -> tuple[str, Path | None]:
    name, marker, folder = text.partition("@")
    if not marker:
        return name, None
    path = Path(os.path.expanduser(folder))
    if not os.path.isdir(path):
        raise SampleError(f"There is no folder {folder!r} to read the benchmark {name} from.")
    return name, path.absolute()


def _load(benchmark: Benchmark, where: str, task: str) -> Any:
    """Loads one table with the columns to read; images stay encoded."""
    try:
        import datasets
    except ImportError as error:
        raise SampleError(_INSTALL) from error
    shown = f"{where}{f', task {task}' if task else ''}, split {benchmark.split}"
    try:
        table = datasets.load_dataset(where, task or None, split=benchmark.split)
    except Exception as error:  # The library, its readers and the network raise many kinds.
        raise SampleError(
            f"{shown} cannot be loaded: {type(error).__name__}: {error}. Without a network, read "
            f"a copy: hf download {benchmark.repository} --repo-type dataset --local-dir FOLDER, "
            "then benchmark:NAME@FOLDER."
        ) from error
    missing = [column for column in benchmark.columns if column not in table.column_names]
    if missing:
        raise SampleError(
            f"{shown} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Is it another data set, or a newer form of this one?"
        )
    table = table.select_columns(list(benchmark.columns))
    try:
        for column in benchmark.images:
            encoded = datasets.Image(decode=False)
            of_list = not isinstance(table.features[column], datasets.Image)
            table = table.cast_column(column, datasets.List(encoded) if of_list else encoded)
    except (TypeError, ValueError) as error:
        raise SampleError(f"{shown}: `{column}` does not hold images: {error}") from error
    return table


def _revision(table: Any) -> str:
    """The hub's commit that the table was made from, such as "@1a2b3c4"; empty if unknown."""
    for url in table.info.download_checksums or ():
        found = re.match(r"hf://datasets/[^@]+@([0-9a-f]{7,40})/", url)
        if found:
            return f"@{found.group(1)}"
    return ""


def _muirbench(row: Mapping[str, Any], archives: "_Archives") -> list[dict[str, Any]]:
    options = [f"({chr(ord('A') + index)}) {text}" for index, text in enumerate(row["options"])]
    text = "\n".join([row["question"], *options, _ANSWER])
    return _fitting(text, [_encoded(image) for image in row["image_list"]])


def _mmiu(row: Mapping[str, Any], archives: "_Archives") -> list[dict[str, Any]]:
    # Most contexts already end with the options.
    question, context, options = (
        (row[column] or "").strip() for column in ("question", "context", "options")
    )
    pieces = [question, context, "" if options in context else options, _ANSWER]
    text = "\n".join(piece for piece in pieces if piece)
    return _fitting(text, [archives.image(path) for path in row["input_image_path"]])


def _blink(row: Mapping[str, Any], archives: "_Archives") -> list[dict[str, Any]]:
    images = [row[column] for column in _BLINK_IMAGES if row[column] is not None]
    return _fitting(row["prompt"], [_encoded(image) for image in images])


def _fitting(text: str, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not images:
        raise _UnfitRow
    try:
        return interleave(text, images)
    except SampleError as error:
        raise _UnfitRow from error


def _encoded(image: Mapping[str, Any] | None) -> dict[str, Any]:
    """An image part, from an image that `datasets` has not decoded."""
    if image is None:
        raise _UnfitRow
    if image["bytes"] is None:
        return {"type": "image", "path": image["path"]}
    return _from_bytes(image["bytes"])


def _from_bytes(data: bytes) -> dict[str, Any]:
    # As base64 text, because a PIL image would keep its decoded pixels in memory.
    return {"type": "image", "base64": base64.b64encode(data).decode()}


class _Archives:
    """Finds images by the paths in a table: in the folder, or in zip files of the same repository.

    The first folder of a path is the zip file's name. Inside the zip file, paths start with this
    folder or below it.
    """

    def __init__(self, benchmark: Benchmark, folder: Path | None):
        self._benchmark = benchmark
        self._folder = folder
        self._open: dict[str, zipfile.ZipFile] = {}

    def __enter__(self) -> "_Archives":
        return self

    def __exit__(self, *error: object) -> None:
        for archive in self._open.values():
            archive.close()

    def image(self, path: str) -> dict[str, Any]:
        """The image part for a path such as "./Low-level-semantic/task/task_0_0.jpg".

        Raises:
          SampleError: the file is neither in the folder nor in the zip file.
        """
        inside = path.removeprefix("./")
        if self._folder is not None and (self._folder / inside).is_file():
            return {"type": "image", "path": str(self._folder / inside)}
        group, _, rest = inside.partition("/")
        archive = self._archive(f"{group}.zip")
        for name in (inside, rest):
            try:
                return _from_bytes(archive.read(name))
            except KeyError:
                continue
            except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
                raise SampleError(f"{archive.filename}, {name}: {error}") from error
        raise SampleError(f"{archive.filename} has no image {inside}.")

    def _archive(self, name: str) -> zipfile.ZipFile:
        if name not in self._open:
            try:
                self._open[name] = zipfile.ZipFile(self._archive_file(name))
            except (zipfile.BadZipFile, OSError) as error:
                raise SampleError(f"{name} of {self._benchmark.repository}: {error}") from error
        return self._open[name]

    def _archive_file(self, name: str) -> Path:
        if self._folder is not None:
            return self._folder / name
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    self._benchmark.repository, name, repo_type="dataset"
                )
            )
        except Exception as error:  # The library and the network raise many kinds.
            raise SampleError(
                f"{name} of {self._benchmark.repository} cannot be fetched: {error}"
            ) from error


_BLINK_IMAGES = ("image_1", "image_2", "image_3", "image_4")
_BLINK_TASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)

BENCHMARKS = {
    "muirbench": Benchmark(
        "MUIRBENCH/MUIRBENCH",
        "test",
        ("question", "options", "image_list"),
        ("image_list",),
        _muirbench,
    ),
    "mmiu": Benchmark(
        "FanqingM/MMIU-Benchmark",
        "test",
        ("question", "context", "options", "input_image_path"),
        (),
        _mmiu,
    ),
    "blink": Benchmark(
        "BLINK-Benchmark/BLINK",
        "val",
        ("prompt", *_BLINK_IMAGES),
        _BLINK_IMAGES,
        _blink,
        tasks=_BLINK_TASKS,
    ),
}
