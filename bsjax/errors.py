"""Every exception bsjax raises on purpose, so that a caller can catch what it means.

All derive from `BsjaxError`. Those that say an argument was wrong are also `ValueError`s, those
that say a file was wrong are not: a caller that guards against bad input can keep catching what it
knows.
"""


class BsjaxError(Exception):
    """Base of all exceptions raised on purpose by bsjax."""


class TemplateError(BsjaxError, ValueError):
    """Token ids, segments or sinks do not describe a prompt."""


class MaskError(BsjaxError, ValueError):
    """A block mask was asked for something it cannot be, or used with arrays it does not fit."""


class BackendError(BsjaxError, ValueError):
    """An attention backend is unknown, or cannot do what was asked of it."""


class MessageError(BsjaxError, ValueError):
    """Chat messages cannot be turned into a prompt: empty, unreadable image, wrong image count."""


class SampleError(BsjaxError, ValueError):
    """Samples to profile on cannot be read: no such source, a malformed line, a broken image."""


class GenerationError(BsjaxError, ValueError):
    """A generation argument is out of range."""


class CapacityError(BsjaxError, ValueError):
    """A prompt does not fit the model's positions or the memory of the device."""


class CheckpointError(BsjaxError):
    """A checkpoint, Hugging Face's or converted, is missing, damaged or of another model."""


class ProfileError(BsjaxError, ValueError):
    """A profile is malformed, or was made for another model."""
