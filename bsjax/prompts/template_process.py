"""The process that renders chat templates: a script that needs jinja2 but nothing from bsjax.

A template is a program written by the author of the checkpoint. Some operations, such as
`10**10**10`, run in C, where nothing can interrupt them. Limits on memory and time can therefore
only be enforced on a separate process: this script limits its own memory, and the parent kills it
when its time is up.

Reads requests from stdin and answers each on stdout, both as one line of JSON.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime
from typing import Any


def main() -> None:
    """Answers requests until stdin ends.

    The first line has `path`, where to import jinja2 from, and `bytes`, the limit on memory. Each
    further line has `template`, `variables`, `seconds` and `characters`, and is answered by `text`
    or `error`, with `ends` if it is the last answer.
    """
    settings = json.loads(sys.stdin.readline())
    sys.path[:] = settings["path"]
    # Ctrl-C is for the parent, which ends this process by closing stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    environment = _environment()
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits.
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (settings["bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _write({"ready": True})
    compiled: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        # Ends the process even if the parent is gone and a C function never returns.
        if hasattr(signal, "alarm"):
            signal.alarm(int(request["seconds"]) + 2)
        source = request["template"]
        try:
            if source not in compiled:
                compiled.clear()
                compiled[source] = environment.from_string(source)
            answer = _rendered(compiled[source], request["variables"], request["characters"])
            _write(answer)
        except MemoryError:
            _write({"error": "it needs too much memory.", "ends": True})
            return
        except RecursionError:
            _write({"error": "it calls itself without end.", "ends": True})
            return
        except Exception as error:  # A template's operations can raise anything.
            reason = str(error)[:1000] or type(error).__name__
            line_number = getattr(error, "lineno", None)
            _write({"error": f"line {line_number}: {reason}" if line_number else reason})
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _rendered(template: Any, variables: dict[str, Any], most: int) -> dict[str, str]:
    pieces, characters = [], 0
    for piece in template.generate(**variables):
        characters += len(piece)
        if characters > most:
            return {"error": f"the text that it makes has more than {most:,} characters."}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _environment() -> Any:
    """An environment in which templates render as in transformers, which a test verifies."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's text for training. Here it has no effect."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line_number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("body_of")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line_number)

        def body_of(self, caller: Any) -> str:
            return caller()

    class PublicNamespace(jinja2.utils.Namespace):
        """A namespace without names that start with an underscore."""

        def __init__(*arguments: Any, **attributes: Any) -> None:
            self, *rest = arguments
            values = dict(*rest, **attributes)
            for name in values:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"names in a namespace cannot start with an underscore: {name!r}."
            )

    class MakeDict:
        """`dict`, without the attributes of the class."""

        def __call__(self, *arguments: Any, **items: Any) -> dict[Any, Any]:
            return dict(*arguments, **items)

        def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
            return dict.fromkeys(*arguments)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": MakeDict(),
        "namespace": PublicNamespace,
    }
    return environment


if __name__ == "__main__":
    main()
