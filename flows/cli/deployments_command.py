"""`ptbin deployments`: the operator's files, as the wheel carries them, written out to be edited."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from flows.cli.help import GroupedCommand
from flows.cli.printing import print_line
from ptbin.errors import StorageError, UsageError

EPILOG = """\b
Examples:
  ptbin deployments
  ptbin deployments /srv/ptbin/deployments

Writes prefect.yaml, the templates of the work pools, the Compose and Kubernetes files, the automations
and the constraints.txt that this version was tested with; README.md among them says what to do next. If a
file there differs, the command stops before it writes anything, unless --force."""


@click.command("deployments", epilog=EPILOG, cls=GroupedCommand)
@click.argument("folder", default="deployments", type=click.Path(path_type=Path, file_okay=False))
@click.option("--force", is_flag=True, help="Replace files that differ.")
def deployments_command(folder: Path, force: bool) -> int:
    """Write the files that schedule ptbin with Prefect into FOLDER."""
    root = files("flows") / "deployments"
    if not root.is_dir():
        raise UsageError("this installation carries no deployments; take those of the checkout it came from")
    contents = {folder / name: text for name, text in _iter_files(root)}
    differing = [path for path, text in contents.items() if path.exists() and path.read_bytes() != text]
    if differing and not force:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UsageError(f"{differing[0]}{more} differs from what would be written; --force replaces it")
    try:
        for path, text in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename}: {error.strerror}") from error
    print_line(f"{len(contents)} files in {folder}; begin with {folder / 'README.md'}")
    return 0


def _iter_files(root: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for item in sorted(root.iterdir(), key=lambda item: item.name):
        if item.is_dir() and item.name != "__pycache__":
            found += _iter_files(item, f"{prefix}{item.name}/")
        elif item.is_file():
            found.append((prefix + item.name, item.read_bytes()))
    return found
