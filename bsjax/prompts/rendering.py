"""Renders chat templates in a process of their own, which is ended when they exceed their limits.

A chat template comes with the checkpoint and is a program. transformers' sandbox keeps it
from reaching files and the network, but not from running forever or filling the memory: see
`template_process`.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bsjax.errors import MessageError
from bsjax.prompts import template_process

RENDER_SECONDS = 5.0
"""Longest time that rendering may take. Published templates take about a millisecond."""

RENDER_BYTES = 2**29
"""Most memory of the process that renders, as address space; jinja2 itself takes 30 MB."""

MAX_CHARACTERS = 1_200_000
"""Most characters of a rendered template: those of the messages, and what a template adds."""

_START_SECONDS = 60.0

# transformers may change messages before a template gets them. This template prints what it gets.
_MESSAGES = "{{ messages | tojson }}"

# What transformers adds to a message that is to be continued, to find where it ends. Templates see
# it, so it has to be the same.
_END = "CONTINUE_FINAL_MESSAGE_TAG "


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    continue_final_message: bool = False,
) -> str:
    """The tokenizer's chat template, rendered for messages, up to where the answer goes on.

    The text is that of transformers' `apply_chat_template`.

    Args:
      tokenizer: holds the template.
      messages: what the template gets: images are `{"type": "image"}`.
      continue_final_message: whether the text ends where the text of the last message ends, rather
        than where a new answer begins.

    Raises:
      MessageError: there is no template, or it cannot be rendered, exceeds a limit, renders to
        nothing, or changes the text of the message that is to be continued. The message names the
        template.
    """
    if not tokenizer.chat_template:
        raise MessageError(
            "The checkpoint's tokenizer has no chat template, so messages cannot be turned "
            "into a prompt. Put the model's chat_template.jinja in the folder of its tokenizer "
            "and convert again."
        )
    name = f"The chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    try:
        shown_messages = tokenizer.apply_chat_template(
            messages, chat_template=_MESSAGES, tokenize=False, add_generation_prompt=True
        )
        shown = json.loads(str(shown_messages))
        final_text = _tag_end(shown[-1]) if continue_final_message else ""
        request = {
            "template": tokenizer.get_chat_template(),
            "variables": {
                **{key: _plain(value) for key, value in tokenizer.special_tokens_map.items()},
                "messages": shown,
                "tools": None,
                "documents": None,
                "add_generation_prompt": not continue_final_message,
            },
            "seconds": RENDER_SECONDS,
            "characters": MAX_CHARACTERS,
        }
        line = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"{name} cannot be given these messages: {error}") from error
    answer = _PROCESS.ask(line, RENDER_SECONDS)
    if "error" in answer:
        raise MessageError(f"{name} cannot render these messages: {answer['error']}")
    text = answer["text"]
    if continue_final_message:
        text = _up_to_end(text, final_text, name)
    if not text:
        raise MessageError(f"{name} renders these messages to nothing.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MessageError(
            f"{name} writes {ascii(text[error.start])}, half of a surrogate pair, which is not a "
            "character."
        ) from None
    return text


def _tag_end(message: dict[str, Any]) -> str:
    """Marks the end of a message's last text, in place, and returns that text."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END
        return content
    part = next(part for part in reversed(content) if "text" in part)
    text = part["text"]
    part["text"] = text + _END
    return text


def _up_to_end(text: str, final_text: str, name: str) -> str:
    """A rendered template up to the end of the last message's text, found as transformers does."""
    end = text.rfind(_END.strip())
    if end < 0 or final_text.strip() not in text:
        raise MessageError(
            f"{name} does not write the text of the last message as it is, so that message cannot "
            "be continued or scored."
        )
    # Without its space, the template trims the text: then what it would have trimmed goes too.
    return text[:end] if text.startswith(_END, end) else text[:end].rstrip()


def _plain(value: Any) -> Any:
    return [str(each) for each in value] if isinstance(value, list | tuple) else str(value)


class _RenderingProcess:
    """The process, which starts when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):  # Windows has no forks.
            os.register_at_fork(after_in_child=self.reset)
        atexit.register(self.end)

    def reset(self) -> None:
        """Forgets the process, which belongs to the parent after a fork."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """The answer to a request; if the process was ended, an error that says why."""
        with self._lock:
            try:
                process = self._started()
                reply, late = _exchange(process, line, seconds)
            except BaseException as error:
                # Interrupted: its late answer would be mistaken for that of the next request.
                self.end()
                if isinstance(error, OSError):
                    return {"error": f"the process that renders it fails: {error}."}
                raise
            if reply.endswith(b"\n"):
                answer = json.loads(reply)
                if "ends" in answer:
                    self.end()
                return answer
            code = process.wait()
            self.end()
        if late:
            return {"error": f"it takes longer than {seconds:g} s."}
        return {"error": f"it ended the process that renders it (exit status {code})."}

    def end(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            if self._process.poll() is None:
                return self._process
            self.end()
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(Path(template_process.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        settings = json.dumps({"path": sys.path, "bytes": RENDER_BYTES})
        reply, _ = _exchange(process, settings, _START_SECONDS)
        if not reply.endswith(b"\n"):
            raise OSError("it does not start")
        return process


def _exchange(process: subprocess.Popen[bytes], line: str, seconds: float) -> tuple[bytes, bool]:
    """Writes a line and reads one; also says whether the process was killed for taking too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # It has ended, which the read shows.
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        return process.stdout.readline(), late.is_set()
    finally:
        timer.cancel()


_PROCESS = _RenderingProcess()
