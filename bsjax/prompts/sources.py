"""Where images of messages may come from, and how large they may be."""

import dataclasses
from dataclasses import dataclass

from bsjax.checks import positive_number, truth_value, whole_number
from bsjax.errors import MessageError

_MOST_SECONDS = 1e9


@dataclass(frozen=True, kw_only=True)
class ImageSources:
    """Which images a prompt may read, and limits on them.

    The defaults are for a program that runs on its user's own messages. A service that answers
    other people's messages should set `allow_files=False`, and `allow_urls=False` unless it needs
    URLs.

    Attributes:
      allow_files: whether messages may name files of this machine.
      allow_urls: whether messages may name `http` and `https` URLs, which are downloaded. Data URLs
        hold their image themselves and are always allowed.
      allow_private_addresses: whether URLs may lead to this machine or its own network, directly or
        by a redirect.
      max_bytes: the largest download, data URL or base64 image, in bytes.
      max_seconds: the longest time that one download may take, redirects included.
      max_redirects: the most redirects of one download.
      max_source_pixels: the most pixels of an image as it is given, before it is scaled; by
        default the number from which Pillow suspects a decompression bomb.
      max_scaled_pixels: the most pixels that an image is scaled to, crops included; by default
        twice what the published checkpoints scale to.

    Raises:
      MessageError: a setting has the wrong type, or is out of range.
    """

    allow_files: bool = True
    allow_urls: bool = True
    allow_private_addresses: bool = False
    max_bytes: int = 100 * 2**20
    max_seconds: float = 30.0
    max_redirects: int = 5
    max_source_pixels: int = 89_478_485
    max_scaled_pixels: int = 25_690_112

    def __post_init__(self) -> None:
        for name in ("allow_files", "allow_urls", "allow_private_addresses"):
            truth_value(name, getattr(self, name), error=MessageError)
        for name in ("max_bytes", "max_source_pixels", "max_scaled_pixels"):
            whole_number(name, getattr(self, name), least=1, error=MessageError)
        whole_number("max_redirects", self.max_redirects, least=0, error=MessageError)
        # Clocks of operating systems do not count much further than this, which is centuries.
        positive_number("max_seconds", self.max_seconds, most=_MOST_SECONDS, error=MessageError)

    def restricted(
        self, allow_files: bool | None = None, allow_urls: bool | None = None
    ) -> "ImageSources":
        """These settings, overridden by the arguments of one call; None keeps a setting."""
        changes = {"allow_files": allow_files, "allow_urls": allow_urls}
        return dataclasses.replace(
            self, **{name: value for name, value in changes.items() if value is not None}
        )


DEFAULT_SOURCES = ImageSources()
"""Everything that a user may name on their own machine."""
