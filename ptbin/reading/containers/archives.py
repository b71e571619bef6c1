"""Checkpoints that lie inside an archive: NeMo's `.nemo`, stable-baselines3's `.zip`, tars and zips.

A member that is stored uncompressed is a byte range of the archive: it is indexed where it lies, and its
weights are spliced from there. First bytes tell which members are checkpoints, never names. One is the
checkpoint; several become a mapping by member name, so that selection (and `--select MEMBER`) applies to them
as to any mapping. Member names are text and never become paths.

Costs: what walking the archive costs (`tar`, `zip_directory`), a request for each zip member whose first
bytes are looked at, and for each checkpoint found as much as for a separate file.

The records of an embedded torch archive lose their framing: it counts offsets from the archive's own
beginning (`framing`), so headers are written anew and only the weights' bytes are taken.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ptbin.errors import (
    IncompleteCheckpointError,
    LimitExceededError,
    NotACheckpointError,
    UnsupportedFormatError,
)
from ptbin.reading.containers.checkpoint import MAX_NESTING, Checkpoint, Opening
from ptbin.reading.containers.legacy import looks_like_legacy
from ptbin.reading.containers.safetensors import looks_like_safetensors
from ptbin.reading.containers.source import SourceFile, Window
from ptbin.reading.containers.tar import MAX_INDEX_READS, WINDOW_NBYTES, TarMember, iter_tar, looks_like_tar
from ptbin.reading.containers.torch_tar import is_torch_tar, read_torch_tar
from ptbin.reading.containers.zip_directory import STORED, Member, ZipDirectory
from ptbin.values.framing import LOCAL_HEADER
from ptbin.values.nodes import DictNode
from ptbin.values.tensors import ByteRange, Place

HEAD_NBYTES = 512
SMALLEST_NBYTES = 16  # nothing shorter holds a tensor
MAX_CHECKPOINTS = 256

KNOWN_MODELS = ("policy.pth", "model_weights.ckpt")
"""The member that holds the model where there are several: stable-baselines3 and NeMo."""

KNOWN_ROLES = {"pytorch_variables.pth": "trainer_state"}
"""What the algorithms of stable-baselines3 keep next to their policy: an entropy coefficient, say."""


# Files of a checkpoint that is a folder: torch.distributed.checkpoint, DeepSpeed's ZeRO, Hugging Face shards.
_OF_A_FOLDER = re.compile(r"(\.distcp|_optim_states\.pt|-\d{5}-of-(?!00001)\d{5}\.\w+)$")

# Folders of one rank each (NeMo's and Megatron's model parallelism).
_OF_A_RANK = re.compile(r"(?:^|/)((?:mp|tp|pp)_rank_\d+[\w]*)/")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member of an archive: how it begins, unpacked, and where its data are."""

    name: str
    nbytes: int
    head: Callable[[], bytes]
    locate: Callable[[], int]
    packed: bool = False


def _zip_entry(directory: ZipDirectory, member: Member) -> _Entry:
    packed = member.method != STORED

    def head() -> bytes:
        room = min(WINDOW_NBYTES, member.next_offset - member.header_offset)
        window = directory.file.read_ahead(member.header_offset, room, WINDOW_NBYTES, "member")
        *_, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack_from(window)
        start = LOCAL_HEADER.size + name_nbytes + extra_nbytes
        data = window[start : start + member.compressed_nbytes]
        if not packed:
            return data[:HEAD_NBYTES]
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD_NBYTES)
        except zlib.error:
            return b""  # damaged, and not needed

    locate = partial(directory.data_offset_of, member, trusted=False)
    return _Entry(member.name, member.nbytes, head, locate, packed)


def _tar_entry(member: TarMember, head: bytes) -> _Entry:
    return _Entry(member.name, member.nbytes, lambda: head, lambda: member.offset)


def read_tar_archive(opening: Opening) -> Checkpoint | None:
    """Index the checkpoints of a tar archive; None where the file does not begin as one.

    Raises:
        NotACheckpointError: no member is a checkpoint.
        CorruptArchiveError, LimitExceededError, UnsupportedFormatError: as `iter_tar`.
    """
    file = opening.file
    if not looks_like_tar(file.head(HEAD_NBYTES)):
        return None
    members: list[TarMember] = []
    entries: list[_Entry] = []
    try:
        for member in iter_tar(file):
            members.append(member)
            if member.nbytes >= SMALLEST_NBYTES:
                # Now, while the response that held its header is still in memory.
                nbytes = min(member.nbytes, HEAD_NBYTES, file.size - member.offset)
                head = file.read_ahead(member.offset, nbytes, WINDOW_NBYTES, "member")
                if _begins_a_checkpoint(head, member.nbytes):
                    entries.append(_tar_entry(member, head))
    except LimitExceededError as error:
        if not entries:
            raise NotACheckpointError(str(error)) from error  # a data set, most likely
        raise
    if is_torch_tar(members):
        return read_torch_tar(opening, members)
    checkpoint = _read_members(
        opening, "tar", entries, lambda name: f"tar -xf {_file_name(file)} {_quoted(name)}"
    )
    if checkpoint is not None:
        taken = {entry.locate() for entry in entries}
        checkpoint.other_members.extend((m.name, m.nbytes) for m in members if m.offset not in taken)
        return checkpoint
    listed = ", ".join(_shown(member.name) for member in members[:3]) or "none"
    raise NotACheckpointError(f"{file.uri}: a tar archive without a checkpoint (members: {listed})")


def read_zip_archive(opening: Opening, directory: ZipDirectory) -> Checkpoint | None:
    """Index the checkpoints in a zip archive that is not one itself; None where it holds none."""
    file = opening.file
    return _read_members(
        opening,
        "zip",
        [_zip_entry(directory, member) for member in directory.members.values() if member.name[-1:] != "/"],
        lambda name: f"unzip {_file_name(file)} {_quoted(name)}",
    )


def _read_members(
    opening: Opening, container: str, entries: Sequence[_Entry], command: Callable[[str], str]
) -> Checkpoint | None:
    file = opening.file
    _refuse_parts(file, [entry.name for entry in entries], command)
    found: dict[str, Checkpoint] = {}
    others: list[tuple[str, int]] = []
    for entry in entries:
        if file.reads_ahead > MAX_INDEX_READS:
            message = f"{file.uri}: an archive with more members than ptbin looks into; unpack it"
            raise (LimitExceededError if found else NotACheckpointError)(message)
        if entry.nbytes < SMALLEST_NBYTES or not _begins_a_checkpoint(entry.head(), entry.nbytes):
            others.append((entry.name, entry.nbytes))
            continue
        if entry.packed:
            raise UnsupportedFormatError(
                f"{file.uri}: the checkpoint {_shown(entry.name)} is compressed inside the archive; "
                f"unpack it with `{command(entry.name)}` and convert that"
            )
        if entry.name in found:
            raise UnsupportedFormatError(
                f"{file.uri}: two checkpoints named {_shown(entry.name)}; unpack the one that is meant"
            )
        if len(found) == MAX_CHECKPOINTS:
            raise LimitExceededError(f"{file.uri}: more than {MAX_CHECKPOINTS} checkpoints in one archive")
        checkpoint = _read_member(opening, entry)
        if checkpoint is None:
            others.append((entry.name, entry.nbytes))
        else:
            found[entry.name] = checkpoint
    return _joined(opening, container, found, others) if found else None


def _refuse_parts(file: SourceFile, names: Sequence[str], command: Callable[[str], str]) -> None:
    """Refuse an archive whose members are parts of one model: none of them is a checkpoint by itself."""
    part = next((name for name in names if _OF_A_FOLDER.search(name)), None)
    if part is not None:
        raise UnsupportedFormatError(
            f"{file.uri}: a checkpoint of several files inside an archive ({_shown(part)} is one of them); "
            f"unpack it with `{command('').rstrip()}` and convert the folder"
        )
    ranks = {match[1] for name in names if (match := _OF_A_RANK.search(name))}
    if len(ranks) > 1:
        raise IncompleteCheckpointError(
            f"{file.uri}: one model in {len(ranks)} parts ({', '.join(sorted(ranks)[:4])}), which ptbin does "
            f"not join; unpack it with `{command('').rstrip()}` and join them with the code that saved them"
        )


def _begins_a_checkpoint(head: bytes, nbytes: int) -> bool:
    return (
        head.startswith(b"PK\x03\x04")
        or looks_like_legacy(head)
        or looks_like_safetensors(head, nbytes)
        or looks_like_tar(head)
    )


def _read_member(opening: Opening, entry: _Entry) -> Checkpoint | None:
    """The member as a checkpoint with its places in the whole file; None where it is not one after all."""
    file = opening.file
    if opening.depth + 1 >= MAX_NESTING:
        raise LimitExceededError(f"{file.uri}: archives inside archives, more than {MAX_NESTING} deep")
    offset = entry.locate()
    window = Window(file, offset, entry.nbytes, f"{file.uri}: {_shown(entry.name)}")
    inner = Opening(SourceFile(window), opening.limits, opening.read, opening.depth + 1, opening.programs)
    inner.vocabulary = opening.vocabulary  # one count of tensors for the whole file
    try:
        checkpoint = inner.checkpoint()
    except NotACheckpointError:
        return None
    checkpoint.move(offset, _without_framing)
    checkpoint.unnamed = [(name, at + offset, nbytes) for name, at, nbytes in checkpoint.unnamed]
    return checkpoint


def _joined(
    opening: Opening, container: str, found: dict[str, Checkpoint], others: list[tuple[str, int]]
) -> Checkpoint:
    """One checkpoint as it is, several as a mapping by member name."""
    file = opening.file
    if len(found) == 1:
        ((name, inner),) = found.items()
        nested = [(f"{name}/{other}", nbytes) for other, nbytes in inner.other_members]
        return dataclasses.replace(
            inner,
            uri=file.uri,
            size=file.size,
            container=container,
            archive_root=None,
            other_members=others + nested,
        )
    storages = {}
    classes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for name, inner in found.items():
        storages.update({f"{name}/{key}": storage for key, storage in inner.storages.items()})
        for path, names in inner.script_classes.items():
            if classes.setdefault(path, names) != names:
                raise UnsupportedFormatError(
                    f"{file.uri}: two TorchScript archives with different classes {path[:200]}; "
                    "unpack the one that is meant"
                )
        others.extend((f"{name}/{other}", nbytes) for other, nbytes in inner.other_members)
    model = next((name for name in KNOWN_MODELS if name in found), None)
    return opening.build(
        container,
        DictNode("dict", [(name, inner.root) for name, inner in found.items()]),
        storages,
        script_classes=classes,
        preferred=model,
        roles={name: role for name, role in KNOWN_ROLES.items() if model is not None and name in found}
        | {f"{name}.{path}": role for name, inner in found.items() for path, role in inner.roles.items()},
        excluded=[
            dataclasses.replace(item, path=f"{name}.{item.path}")
            for name, inner in found.items()
            for item in inner.excluded
        ],
        unnamed=[
            (f"{name}/{record}", offset, nbytes)
            for name, inner in found.items()
            for record, offset, nbytes in inner.unnamed
        ],
        other_members=others,
    )


def _without_framing(place: Place) -> Place:
    if isinstance(place, ByteRange):
        return dataclasses.replace(place, record_offset=None, closed=False)
    return place


def _file_name(file: SourceFile) -> str:
    return _quoted(file.uri.rstrip("/").rpartition("/")[2])


def _quoted(name: str) -> str:
    """One word of a command; nothing for the empty name, which stands for every member."""
    if not name:
        return ""
    return shlex.quote(name if name.isprintable() else ascii(name))


def _shown(name: str) -> str:
    return repr(name[:200])
