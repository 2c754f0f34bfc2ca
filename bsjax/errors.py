"""All exceptions that bsjax raises on purpose.

All derive from `BsjaxError`. Errors about arguments are also `ValueError`s, so that code which
guards against bad input with `except ValueError` works; errors about checkpoints are not.
"""


class BsjaxError(Exception):
    """Base of all exceptions raised on purpose by bsjax."""


class TemplateError(BsjaxError, ValueError):
    """Token ids, segments or sinks do not describe a prompt."""


class MaskError(BsjaxError, ValueError):
    """Arguments of a block mask are invalid, or arrays do not match each other or their mask."""


class BackendError(BsjaxError, ValueError):
    """An attention backend is unknown, or does not support the request."""


class MessageError(BsjaxError, ValueError):
    """Chat messages cannot be turned into a prompt: empty, unreadable image, wrong image count."""


class SampleError(BsjaxError, ValueError):
    """Samples to profile on cannot be read: no such source, a malformed line, a broken image."""


class GenerationError(BsjaxError, ValueError):
    """A generation argument is out of range."""


class CapacityError(BsjaxError, ValueError):
    """A prompt does not fit the model's positions or the memory of the device."""


class CheckpointError(BsjaxError):
    """A checkpoint, from Hugging Face or converted, is missing, damaged or of another model."""


class ProfileError(BsjaxError, ValueError):
    """A profile is malformed, or was made for another model."""
