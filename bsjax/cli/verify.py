"""`bsjax verify`: compares every file of a converted checkpoint with its manifest."""

import argparse
from typing import Any

from bsjax.errors import CheckpointError


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "verify",
        help="check that a checkpoint's files are those that were converted",
        description="Compares every file of a converted checkpoint with the SHA-256 that the "
        "converter wrote into its manifest.json. Reads the files, but loads nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument(
        "--fingerprint",
        metavar="HEX",
        help="what the manifest's fingerprint must be: the one that the converter printed. Without "
        "it, a folder whose manifest was changed together with its files is accepted",
    )
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> None:
    from bsjax.checkpoint.folder import folder_path
    from bsjax.checkpoint.manifest import verify_manifest

    verified = verify_manifest(folder_path(options.checkpoint))
    expected = options.fingerprint
    if expected is not None and expected.strip().lower() != verified.fingerprint:
        raise CheckpointError(
            f"{options.checkpoint} has the fingerprint {verified.fingerprint}, not {expected}: it "
            "is another conversion, or was changed together with its manifest."
        )
    print(f"files        {verified.files}, all as they were converted")
    print(f"size         {verified.nbytes:,} bytes")
    print(f"fingerprint  {verified.fingerprint}")
