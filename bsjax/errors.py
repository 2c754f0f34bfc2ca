"""All exceptions that bsjax raises on purpose.

All derive from `BsjaxError`. Errors about arguments are also `ValueError`s, so that code which
guards against bad input with `except ValueError` works; errors about checkpoints are not.
"""

# Names in error messages may come from files or chat messages, and can have any length.
_LONGEST_MESSAGE = 2000


class BsjaxError(Exception):
    """Base of all exceptions raised on purpose by bsjax.

    The message is one line that every terminal can print, whatever the names in it contain: line
    breaks become spaces, other non-printable characters are shown as escapes, and the middle of a
    very long message is left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_one_line(message))


def _one_line(text: str) -> str:
    half = _LONGEST_MESSAGE // 2
    if len(text) <= _LONGEST_MESSAGE:
        line = _printable(text)
        if len(line) <= _LONGEST_MESSAGE:
            return line
    # Cut before the rest is read, which may be long, and again because escapes are longer.
    first, last = _printable(text[:half])[:half], _printable(text[-half:])[-half:]
    return f"{first} ... (cut out of {len(text):,} characters) ... {last}"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    text = " ".join(text.split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class TemplateError(BsjaxError, ValueError):
    """Token ids, segments or sinks do not describe a prompt."""


class MaskError(BsjaxError, ValueError):
    """Arguments of a block mask are invalid, or arrays do not match each other or their mask."""


class BackendError(BsjaxError, ValueError):
    """An attention backend is unknown, or does not support the request."""


class MessageError(BsjaxError, ValueError):
    """Chat messages cannot be turned into a prompt: empty, unreadable image, wrong image count."""


class SampleError(BsjaxError, ValueError):
    """Samples, or conversations in a file, cannot be read: no such file, a malformed line."""


class SessionError(BsjaxError, ValueError):
    """A saved session cannot be written or read, or belongs to another model or profile."""


class GenerationError(BsjaxError, ValueError):
    """A generation argument is out of range."""


class CapacityError(BsjaxError, ValueError):
    """A prompt does not fit the model's positions or the memory of the device."""


class CheckpointError(BsjaxError):
    """A checkpoint, from Hugging Face or converted, is missing, damaged or of another model."""


class ProfileError(BsjaxError, ValueError):
    """A profile is malformed, or was made for another model."""
