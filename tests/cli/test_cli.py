"""The console script does what its help says, and says what is wrong with its input."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.checkpoint import loading
from bsjax.cli import main
from bsjax.runtime import arguments as runtime_arguments
from convert.__main__ import main as convert
from tests.support.paths import ROOT

SOURCE = ROOT / "examples" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert([str(SOURCE), str(folder), "--quiet"]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = []
    for index, size in enumerate([(112, 84), (84, 140)]):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(str(folder / f"{index}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(autouse=True)
def load_once(monkeypatch):
    """Loads the model once for all tests of this file, so that its compiled programs are kept."""
    monkeypatch.setattr(loading.WeightsReader, "begin", begin_once)
    monkeypatch.setattr(loading.WeightsReader, "model", model_once)


begin, model = loading.WeightsReader.begin, loading.WeightsReader.model
loaded: dict[Path, bsjax.LoadedModel] = {}


def begin_once(reader, folder, *arguments):
    return None if folder in loaded else begin(reader, folder, *arguments)


def model_once(reader, described):
    if described.path not in loaded:
        loaded[described.path] = model(reader, described)
    return loaded[described.path]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


def answer(capsys, *arguments: str) -> dict:
    status, out, err = run(capsys, "generate", *arguments, "--json", "--max-new-tokens", "6")
    assert status == 0, err
    return json.loads(out)


def test_generate_is_bsjax_generate(capsys, checkpoint, images):
    given = answer(capsys, checkpoint, "What is it?", *images, "--system", "Be brief.")
    content = [{"type": "image", "image": image} for image in images]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]},
    ]
    result = bsjax.generate(bsjax.load(checkpoint), messages, max_new_tokens=6)
    assert given["text"] == result.text
    assert given["token_ids"] == list(result.token_ids)
    assert given["finish_reason"] == result.finish_reason
    assert given["prompt_tokens"] == given["stats"]["prompt_tokens"] == result.prompt_tokens
    assert given["stats"]["image_tokens"] == [12, 15]
    assert given["stats"]["attention_flops_sparse"] == given["stats"]["attention_flops_dense"]


def test_timing_accounts_for_the_whole_command(capsys, checkpoint, images):
    assert main(["generate", checkpoint, "What is it?", *images, "--timing"]) == 0
    lines = capsys.readouterr().err.splitlines()[1:]
    seconds = {line.partition(" s  ")[2]: float(line.partition(" s  ")[0]) for line in lines}
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01)
    assert min(seconds.values()) >= 0 < seconds["prefill"]
    given = answer(capsys, checkpoint, "What is it?", *images)
    assert given["seconds"].keys() == {*seconds, "total"}


def test_images_can_be_arguments_or_options(capsys, checkpoint, images):
    first, second = images
    expected = answer(capsys, checkpoint, "Compare.", first, second)["token_ids"]
    given = answer(capsys, checkpoint, "Compare.", first, "--image", second)
    assert given["token_ids"] == expected
    given = answer(capsys, checkpoint, "Compare.", "--image", first, "--image", second)
    assert given["token_ids"] == expected


def test_generate_uses_the_checkpoints_settings_where_it_is_told_to(
    capsys, checkpoint, images, monkeypatch
):
    given = {}

    def checked_settings(model, backend, **options):
        given.update(options)
        return original(model, backend, **options)

    original = runtime_arguments.checked_settings
    monkeypatch.setattr(runtime_arguments, "checked_settings", checked_settings)
    first = answer(capsys, checkpoint, "What is it?", images[0])
    assert (given["use_generation_config"], given["temperature"]) == (False, None)
    again = answer(
        capsys, checkpoint, "What is it?", images[0], "--use-generation-config", "--max-pixels",
        str(28 * 28 * 4),
    )  # fmt: skip
    assert given["use_generation_config"] is True
    assert first["stats"]["image_tokens"] == [12] and again["stats"]["image_tokens"][0] <= 4


def test_score_prints_how_likely_each_answer_is(capsys, checkpoint, images):
    arguments = ("score", checkpoint, "Is it a cat?", "yes", "no, a dog", "--image", images[0])
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    part = {"type": "image", "image": images[0]}
    asked = {"role": "user", "content": [part, {"type": "text", "text": "Is it a cat?"}]}
    scores = bsjax.score(
        bsjax.load(checkpoint),
        [[asked, {"role": "assistant", "content": words}] for words in ("yes", "no, a dog")],
    )
    lines = out.splitlines()
    assert lines == [
        f"{score.log_probability:.4f}  {words}  ({len(score.token_ids)} tokens)"
        for score, words in zip(scores, ("yes", "no, a dog"), strict=True)
    ]
    status, out, err = run(capsys, *arguments, "--json", "--uniform", "intra-image-sink")
    assert status == 0, err
    sparse = json.loads(out)
    assert [each["token_ids"] for each in sparse] == [list(each.token_ids) for each in scores]
    status, _, err = run(capsys, *arguments[:3], "")
    assert status == 2 and "messages[1] is to be continued or scored, but holds no text" in err


def test_text_without_images_is_answered_and_streamed(capsys, checkpoint):
    arguments = ("generate", checkpoint, "Count to ten.", "--max-new-tokens", "6")
    status, whole, figures = run(capsys, *arguments)
    assert status == 0
    assert "images: none" in figures and "6 new" in figures
    status, streamed, _ = run(capsys, *arguments, "--stream")
    assert status == 0
    assert streamed == whole


@pytest.mark.slow
def test_uniform_and_saved_profiles_give_the_same_answer(capsys, checkpoint, images, tmp_path):
    arguments = (checkpoint, "What is it?", *images)
    sparse = answer(capsys, *arguments, "--uniform", "intra-image")
    stats = sparse["stats"]
    assert stats["attention_flops_sparse"] < stats["attention_flops_dense"]
    path = tmp_path / "profile.json"
    bsjax.Profile.uniform("INTRA_IMAGE", bsjax.load(checkpoint)).save(path)
    again = answer(capsys, *arguments, "--profile", str(path))
    assert again["token_ids"] == sparse["token_ids"]
    assert again["stats"]["attention_flops_sparse"] == stats["attention_flops_sparse"]


@pytest.mark.slow
def test_a_chat_goes_on_and_computes_only_what_is_new(capsys, checkpoint, images, monkeypatch):
    lines = [
        *(f"/image {image}" for image in images),
        "What is it?",
        "/image missing.png",
        "And this?",
        "/wrong",
        "",
        "Why?",
        "/new",
        "Why?",
        "/quit",
        "Never asked.",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, out, err = run(capsys, "chat", checkpoint, "--max-new-tokens", "1")
    assert status == 0
    content = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]
    model = bsjax.load(checkpoint)
    expected = []
    first = bsjax.generate(model, messages, max_new_tokens=1)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Why?"},
    ]
    second = bsjax.generate(model, messages, max_new_tokens=1)
    third = bsjax.generate(model, messages[-1:], max_new_tokens=1)
    expected = [first.text, second.text, third.text]
    assert out == "".join(f"{text}\n" for text in expected)
    reused = re.findall(r"\((\d+) of (\d+) tokens reused", err)
    assert [int(total) for _, total in reused] == [
        result.prompt_tokens for result in (first, second, third)
    ]
    assert int(reused[0][0]) == 0 and int(reused[1][0]) >= first.prompt_tokens - 2
    assert "missing.png" in err and "'/wrong' is not a command" in err
    assert err.count("error: ") == 2


def test_an_interrupted_answer_does_not_end_a_chat(capsys, checkpoint, monkeypatch):
    lines = ["Why?", "Why not?", "/quit"]
    answered = bsjax.Session.generate
    interrupts = iter([True, False])

    def generate(self, *arguments, **options):
        if next(interrupts):
            raise KeyboardInterrupt
        return answered(self, *arguments, **options)

    monkeypatch.setattr(bsjax.Session, "generate", generate)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    status, out, err = run(capsys, "chat", checkpoint, "--max-new-tokens", "1")
    assert status == 0 and "interrupted: ask again" in err
    asked = [{"role": "user", "content": "Why not?"}]
    assert out == f"{bsjax.generate(bsjax.load(checkpoint), asked, max_new_tokens=1).text}\n"


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"bsjax {bsjax.__version__}\n"


def test_max_pixels_scales_images_down(capsys, checkpoint, images):
    given = answer(capsys, checkpoint, "?", *images, "--max-pixels", str(28 * 28 * 4))
    assert max(given["stats"]["image_tokens"]) <= 4


def test_sampling_depends_on_the_seed(capsys, checkpoint):
    drawn = [
        answer(capsys, checkpoint, "?", "--temperature", "2", "--seed", seed)["token_ids"]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = answer(capsys, checkpoint, "?")["token_ids"]
    likeliest = answer(capsys, checkpoint, "?", "--temperature", "2", "--top-k", "1")["token_ids"]
    assert likeliest == greedy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "missing.png"], "Image 1 of 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be"),
        (["--backend", "cudnn"], "cudnn"),
        (["--dtype", "int8"], "int8"),
        (["--profile", "unknown"], "no shipped profile named 'unknown'"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--top-p", "1.5"], "--top-p must be"),
        (["--max-new-tokens", "40000"], "Lower --max-new-tokens to"),
    ],
)
def test_bad_input_gives_a_one_line_error(capsys, checkpoint, options, words):
    status, out, err = run(capsys, "generate", checkpoint, "What is it?", *options)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_checkpoint_that_is_not_converted_is_named(capsys, tmp_path):
    status, _, err = run(capsys, "generate", str(SOURCE), "What is it?")
    assert status == 2
    assert "python -m convert" in err
    status, _, err = run(capsys, "generate", str(tmp_path / "none"), "What is it?")
    assert status == 2
    assert "none" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["answer"],
        ["generate", "folder"],
        ["generate", "folder", "?", "--uniform", "sparse"],
        ["generate", "folder", "?", "--uniform", "sink", "--profile", "a.json"],
        ["generate", "folder", "?", "--stream", "--json"],
        ["generate", "folder", "?", "--max-new-tokens", "many"],
    ],
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: bsjax" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["source", "converted"])
def test_mask_draws_the_mask_of_a_prompt(capsys, checkpoint, images, tmp_path, folder):
    path = tmp_path / "mask.png"
    source = str(SOURCE) if folder == "source" else checkpoint
    status, out, err = run(capsys, "mask", source, "What is it?", *images, "--output", str(path))
    assert status == 0, err
    assert "2 images" in out and str(path) in out
    with Image.open(path) as picture:
        assert picture.width > 500


def test_mask_draws_the_mask_of_segments(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "mask", "--segments", "text:3, image:20,image:10,text:2")
    assert status == 0
    assert "35 tokens, 2 images, INTRA_IMAGE_SINK" in out
    assert Path("mask.png").read_bytes().startswith(b"\x89PNG")
    template = bsjax.Template.from_segments([bsjax.Text(5), bsjax.Image(20), bsjax.Image(10)])
    density = bsjax.BlockMask(template, [bsjax.HeadCategory.SINK]).density
    status, out, _ = run(
        capsys, "mask", "--segments", "text:5,image:20,image:10", "--category", "sink"
    )
    assert f"SINK: {density:.1%}" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--segments"),
        (["folder", "?", "--segments", "text:3"], "not both"),
        (["--segments", "text:3,video:4"], "'video:4'"),
        (["--segments", "text:-3"], "'text:-3'"),
        (["--segments", "image:0"], "at least 1"),
        (["--segments", "text:" + "9" * 5000], "is not text:N"),
        (["--segments", "text:3", "--output", "mask"], "end its name with the format"),
        (["--segments", "text:3", "--output", "mask.exe"], "not supported"),
        (["--segments", "text:3", "--output", "no folder/mask.png"], "no folder"),
        (["no folder", "?"], "no config.json"),
        (["~nobody-of-this-name/x", "?"], "not the path of a folder"),
        ([str(SOURCE), "?", "missing.png"], "Image 1 of 1"),
    ],
)
def test_bad_masks_are_refused(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "mask", *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_damaged_prompt_files_are_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    status, _, err = run(capsys, "mask", str(tmp_path), "?")
    assert status == 2
    assert str(tmp_path) in err


def test_an_interrupted_run_says_so(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "describe", interrupted)
    status, _, err = run(capsys, "generate", "folder", "?")
    assert status == 130
    assert err == "interrupted\n"


@pytest.mark.slow
def test_it_runs_as_a_module_with_a_narrow_terminal_encoding(checkpoint):
    completed = subprocess.run(
        [sys.executable, "-m", "bsjax.cli", "generate", checkpoint, "?", "--max-new-tokens", "20"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert completed.stdout.isascii() and completed.stdout.endswith(b"\n")
    assert b"prompt tokens" in completed.stderr


def test_a_command_that_succeeds_writes_nothing_to_stderr(tmp_path):
    """Not even where JAX has its CUDA plugin but the machine has no CUDA driver."""
    arguments = ["mask", "--segments", "text:3,image:9", "--output", str(tmp_path / "mask.png")]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "bsjax", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_other_lines_of_an_import_still_reach_stderr(tmp_path):
    (tmp_path / "jax_cuda12_plugin.py").touch()
    (tmp_path / "jax.py").write_text(
        "import os\n"
        "os.write(2, b'I0000 cudart_stub.cc:31] Could not find cuda drivers\\n')\n"
        "os.write(2, b'a real error\\n')\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import ctypes\n"
        "from bsjax.cli import imports\n"
        "def no_driver(name):\n    raise OSError(name)\n"
        "ctypes.CDLL = no_driver\n"
        "imports.import_jax()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "a real error\n")


@pytest.mark.parametrize(
    ("has_driver", "platforms", "shown"),
    [(False, "", False), (False, "cpu", False), (True, "", True), (False, "cuda,cpu", True)],
)
def test_a_cuda_plugin_that_cannot_be_used_is_one_line_or_none(
    tmp_path, has_driver, platforms, shown
):
    (tmp_path / "jax_cuda12_plugin.py").touch()
    (tmp_path / "jax.py").write_text(
        "import logging\n"
        "logger = logging.getLogger('jax._src.xla_bridge')\n"
        "try:\n    raise RuntimeError('Unable to load\\nCUDA.')\n"
        "except RuntimeError:\n"
        "    logger.exception('Jax plugin configuration error: %s', 'initialize')\n"
        "    logger.exception('another error')\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bsjax.cli import imports\n"
        f"imports._has_driver = lambda: {has_driver}\n"
        "imports.import_jax()\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    said = "warning: JAX does not use this machine's GPU: Unable to load CUDA.\n"
    assert done.stderr.startswith(said * shown + "another error\nTraceback"), done.stderr


@pytest.mark.parity
@pytest.mark.slow
def test_the_console_script_does_not_import_torch(checkpoint):
    """transformers would, which takes seconds. Afterwards, torch is there as before."""
    program = (
        "import importlib.util, sys\n"
        "from bsjax.cli import main\n"
        f"sys.argv[1:] = ['generate', {str(checkpoint)!r}, '?', 'missing.png']\n"
        "assert main() == 2\n"
        "from transformers.utils import is_torch_available\n"
        "print('torch' in sys.modules, is_torch_available())\n"
        "print(importlib.util.find_spec('torch') is not None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_help_imports_nothing_heavy():
    program = (
        "import sys, bsjax.cli\n"
        "try:\n    bsjax.cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'transformers', 'orbax', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    assert [name for name in bsjax.__all__ if not hasattr(bsjax, name)] == []
    with pytest.raises(AttributeError, match="attribute '?absent"):
        bsjax.absent  # noqa: B018


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [("bsjax", "verify", "{checkpoint}"), ("bsjax", "profile", "show", "small-qwen2.5-vl"),
     ("convert", "{source}", "{folder}/new")],
)  # fmt: skip
def test_output_that_cannot_be_written(checkpoint, tmp_path, arguments):
    names = {"checkpoint": checkpoint, "source": SOURCE, "folder": tmp_path}
    command = [sys.executable, "-m", *(argument.format(**names) for argument in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the output cannot be written: ")


@pytest.mark.slow
def test_folders_that_the_terminal_cannot_show(tmp_path):
    command = [sys.executable, "-m", "convert", str(SOURCE), str(tmp_path / "\u00e9")]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"written to   {tmp_path}/?" in done.stdout
