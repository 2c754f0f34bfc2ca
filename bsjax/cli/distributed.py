"""Commands that run as several processes, each with some of the devices (`jax.distributed`).

Every process is started with the same arguments. Process 0 prints the answers and reads what is
typed; the others say nothing but errors.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from bsjax.cli.watch import SILENT_SECONDS, Watch
from bsjax.errors import GenerationError

_HEARTBEAT_SECONDS = 4 * SILENT_SECONDS
"""After this time without a sign of life, JAX ends the other processes, if `Watch` has not."""

_PATIENCE = 5
"""Seconds of waiting for other processes without a word."""

_JOIN_SECONDS = 240
"""How long to wait for other processes; a minute less than JAX."""

_OF_EACH_PROCESS = ("process", "own_process", "run", "watch", "errors")
"""What belongs to a process in the options of a command, which are otherwise the same in all."""


def add_process_options(parser: Any) -> None:
    """Adds the options; `parser` is a parser or an argument group."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command in every process. Together they have the devices of --tensor and "
        "--context.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="this is a process of a SLURM, Open MPI or Kubernetes job, which has one for each GPU",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 waits for the others"
    )
    group.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0 on")


def is_distributed(options: argparse.Namespace) -> bool:
    """Whether the command is one of several processes."""
    given = (getattr(options, name, None) for name in ("coordinator", "processes", "process"))
    return getattr(options, "distributed", False) or any(each is not None for each in given)


def join(options: argparse.Namespace) -> None:
    """Waits for the other processes. Must be called before JAX has looked for devices.

    Raises:
      GenerationError: the options do not say how to find the others, or they cannot be reached.
    """
    explicit = (options.coordinator, options.processes, options.process)
    check_options(*explicit)
    if not options.own_process:
        raise GenerationError("Only a process of its own can be one of several.")
    import jax
    from jax._src.distributed import global_state  # There is no public way to the client.

    # What two processes with CPU devices use; with GPUs it has no effect.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would keep SIGTERM from ending the process.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = _Waiting(options)
    try:
        jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        hint = "" if options.coordinator else " Outside of such a job, use --coordinator."
        raise GenerationError(
            f"The other processes cannot be joined: {_first_line(error)}{hint}"
        ) from error
    finally:
        waiting.end()
    options.process = jax.process_index()
    devices, wanted = jax.device_count(), options.tensor * options.context
    if devices != wanted:
        raise GenerationError(
            f"The {jax.process_count()} processes have {devices} devices together, but --tensor "
            f"{options.tensor} and --context {options.context} name {wanted}."
        )
    # Gloo writes about its connections to file descriptor 1, which is for answers.
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(answers, "w", errors="replace")  # noqa: SIM115 (open as long as the process)
    if jax.process_index() > 0:
        options.errors = sys.stderr
        # Open as long as the process.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    options.watch = Watch(
        global_state.client,
        options.process,
        jax.process_count(),
        lambda reason: _leave(options, f"error: {reason}", 1),
    )
    check_arguments(global_state.client, options)


def check_options(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Rejects options that do not say how to find the other processes.

    Raises:
      GenerationError: the message names the option.
    """
    if coordinator is None:
        if (processes, process) != (None, None):
            raise GenerationError("--processes and --process need --coordinator HOST:PORT, too.")
        return
    if processes is None or process is None:
        raise GenerationError("--coordinator needs --processes and --process, too.")
    if processes < 1:
        raise GenerationError(f"--processes must be 1 or more, got {processes}.")
    if not 0 <= process < processes:
        raise GenerationError(f"--process must be 0 to {processes - 1}, got {process}.")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise GenerationError(
            f"--coordinator must be HOST:PORT with a port up to {2**16 - 1}, got {coordinator}."
        )
    if process == 0:
        with socket.socket() as own:
            # As JAX does; without it, the port of a command that has just ended counts as in use.
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                own.bind(("", int(port)))
            except OSError as error:
                raise GenerationError(
                    f"Process 0 cannot wait at port {port} of --coordinator ({error.strerror}): "
                    "choose another one."
                ) from error


class _Waiting:
    """Says on stderr that the command waits for other processes, and ends it if they do not come.

    JAX would wait without a word, and end with a stack trace.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._timers = [
            threading.Timer(seconds, action)
            for seconds, action in ((_PATIENCE, self._say), (_JOIN_SECONDS, self._give_up))
        ]
        for timer in self._timers:
            timer.daemon = True
            timer.start()

    def end(self) -> None:
        for timer in self._timers:
            timer.cancel()

    @property
    def _others(self) -> str:
        where = self._options.coordinator
        return f"the other processes{f' at {where}' if where else ''}"

    def _say(self) -> None:
        print(f"waiting for {self._others}", file=sys.stderr, flush=True)

    def _give_up(self) -> None:
        _leave(self._options, f"error: {self._others} have not come.", 1)


def check_arguments(client: Any, options: argparse.Namespace) -> None:
    """Rejects arguments that are not those of process 0.

    Args:
      client: JAX's client of the coordination service.
      options: the options of the command.

    Raises:
      GenerationError: the message names the first that differs.
    """
    own = {
        name: repr(value)
        for name, value in sorted(vars(options).items())
        if name not in _OF_EACH_PROCESS
    }
    key = "bsjax/arguments"
    if options.process == 0:
        client.key_value_set(key, json.dumps(own))
        return
    first = json.loads(client.blocking_key_value_get(key, 1000 * SILENT_SECONDS))
    for name in sorted(own.keys() | first.keys()):
        if own.get(name) != first.get(name):
            raise GenerationError(
                f"Process {options.process} was started with other arguments than process 0: "
                f"{name.replace('_', '-')} is {own.get(name)}, not {first.get(name)}."
            )


@contextlib.contextmanager
def leaving_at_errors(options: argparse.Namespace) -> Iterator[None]:
    """Ends the process at an error. The others, which wait for it, then end as well.

    Python would wait for them, and they for this one.
    """
    if not is_distributed(options):
        yield
        return
    try:
        yield
        if watch := getattr(options, "watch", None):
            watch.finish()
    except BaseException as error:
        from jax.errors import JaxRuntimeError

        from bsjax.errors import BsjaxError

        if isinstance(error, KeyboardInterrupt):
            _leave(options, "interrupted", 130)
        if isinstance(error, BsjaxError):
            _leave(options, f"error: {error}", 2)
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            watch = getattr(options, "watch", None)
            reason = watch.reason() if watch else None
            if reason is None:
                reason = f"another process has ended, or is out of reach: {_first_line(error)}"
            _leave(options, f"error: {reason}", 1)
        if isinstance(error, BrokenPipeError):
            _leave(options, "", 2)
        _leave(options, "".join(traceback.format_exception(error)), 1)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _leave(options: argparse.Namespace, line: str, status: int) -> NoReturn:
    watch = getattr(options, "watch", None)
    if watch is not None:
        watch.begin_end()
    errors = getattr(options, "errors", sys.stderr)
    which = f"process {options.process}: " if options.process else ""
    with contextlib.suppress(OSError, ValueError):
        if line:
            print(f"{which}{line}", file=errors, flush=True)
        sys.stdout.flush()
    if watch is not None:
        watch.end(line.removeprefix("error: ").strip().rpartition("\n")[2])
    os._exit(status)


def same_lines(lines: Iterator[str]) -> Iterator[str]:
    """The lines that process 0 reads, in all processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        yield from lines
        return
    while True:
        line = next(lines, None) if jax.process_index() == 0 else None
        text = b"" if line is None else line.encode()
        # -1 is the end of the input.
        size = multihost_utils.broadcast_one_to_all(np.int32(-1 if line is None else len(text)))
        if size < 0:
            return
        padded = np.frombuffer(text.ljust(int(size), b"\0"), np.uint8)
        yield np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()
