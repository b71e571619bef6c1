"""Which files of a folder are parts of one checkpoint. By names alone, pure.

A name is evidence only where it is a known producer's own (`consolidated.01.pth`), or where the files next
to it count from zero (`x.rank_0.pt`, `x.rank_1.pt`). `epoch_1.pt` next to `epoch_2.pt` is no
evidence, and neither is `best_rank_1.pth`. What the content says is for `reading.parts`.

Sources: Meta's llama (`consolidated.NN.pth`), Megatron-LM's checkpointing.py (`get_checkpoint_name`), NeMo's
`inject_model_parallel_rank`, DeepSpeed's engine and pipeline module (`_get_ckpt_name`,
`_get_expert_ckpt_name`, `ckpt_layer_path`), torch's distributed/checkpoint/_hf_utils.py
(`SHARDED_FILE_NAME`), transformers' `SAFE_WEIGHTS_NAME` with shards, verl's FSDP checkpoint
manager, fairseq's checkpoint_utils.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ptbin.sources.deepspeed_names import (
    EXPERT,
    LAYER,
    MODEL_STATES,
    OPTIM_STATES,
    UNIVERSAL_OPTIMIZER,
    deepspeed_checkpoint,
    is_universal_name,
)
from ptbin.sources.leftovers import is_leftover

MAX_LISTED_NAMES = 5
MAX_COUNTED = 100_000

_WEIGHTS = r"\.(?:pt|pth|bin|ckpt|safetensors)"

# A folder for each rank, one level above the file.
_RANK_FOLDER = re.compile(
    r"^(?:mp_rank_(?P<tp>\d{2,})(?:_(?P<pp>\d{3}))?(?:_(?P<ep>\d{3}))?"
    r"|tp_rank_(?P<tp2>\d{2})_pp_rank_(?P<pp2>\d{3}))$"
)
_IN_RANK_FOLDER = re.compile(r"^.+\.(?:pt|pth|ckpt)$")
_MEGATRON_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_weights.ckpt")

_META = re.compile(r"^consolidated\.(?P<n>\d{2})(?P<tail>\.(?:pth|pt|bin|safetensors))$")
_OF_WORLD = re.compile(rf"^(?P<stem>.*)world_size_(?P<of>\d+)_rank_(?P<n>\d+)(?P<tail>{_WEIGHTS})$")
_TORCH_SHARD = re.compile(r"^shard-(?P<n>\d{5})-model-\d{5}-of-\d{5}\.safetensors$")
_HF_SHARD = re.compile(r"^(?P<stem>.+)-(?P<n>\d{5,})-of-(?P<of>\d{5,})(?P<tail>\.(?:bin|safetensors))$")
_CHUNKS = re.compile(r"^__\d+_\d+\.distcp$")
_RANK = re.compile(
    rf"^(?P<stem>(?:.*[._-])?)rank[._=-]?(?P<n>\d{{1,5}})(?P<tail>(?:[._-]of[._-]\d{{1,5}})?{_WEIGHTS})$"
)
_COUNTED = (
    _RANK,
    re.compile(rf"^(?P<stem>.*)-shard(?P<n>\d{{1,5}})(?P<tail>{_WEIGHTS})$"),
    re.compile(rf"^(?P<stem>.*)-model_part-(?P<n>\d{{1,5}})(?P<tail>(?:-shard\d+)?{_WEIGHTS})$"),
)
# `best_rank_0.pth`, `top_rank0.pt`: the rank is a place in a contest.
_CONTEST = re.compile(
    r"(?:^|[._-])(?:best|top\d*|worst|low|high|lora|loss|acc|score)(?:[._-]|$)", re.IGNORECASE
)

_PATTERNS = (
    *(_META, LAYER, EXPERT, MODEL_STATES, _OF_WORLD, _TORCH_SHARD, _HF_SHARD, _CHUNKS),
    *_COUNTED,
)

INDEX_SUFFIX = ".index.json"
META_PARAMETERS = "params.json"
"""Of the model that Meta's parts are of: its width, its heads."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Files that are one checkpoint only together.

    Attributes:
        members: names as they were given.
        why: what they are and what to do, as half a sentence.
        kind: of the checkpoint that all of them are (`folders.Group`); empty where nothing puts them together
            or some are missing by their names.
    """

    members: tuple[str, ...]
    why: str
    kind: str = ""


def split_place(path: str) -> tuple[str, str]:
    """Folder of the checkpoint that a file may be part of, and the file's name in it.

    The name is the last step of the path, but where that lies in a folder of its own, of a rank
    (`mp_rank_00/...`) or of a parameter (`zero/<name>/fp32.pt`).
    """
    universal = is_universal_name(path)
    if universal is not None:
        return universal["folder"] or "", universal["name"]
    above, _, name = path.rpartition("/")
    if path.endswith(f"/{UNIVERSAL_OPTIMIZER}") or path == UNIVERSAL_OPTIMIZER:
        return path[: -len(UNIVERSAL_OPTIMIZER)].rstrip("/"), UNIVERSAL_OPTIMIZER
    folder, _, last = above.rpartition("/")
    if _RANK_FOLDER.match(last) and _IN_RANK_FOLDER.match(name):
        return folder, f"{last}/{name}"
    return above, name


def may_be_part(name: str) -> bool:
    """Whether the name (as `split_place` gives it) alone calls for a look at the names next to it."""
    if is_leftover(name):
        return False
    return "/" in name or any(pattern.match(name) for pattern in _PATTERNS)


def is_rank_name(name: str) -> bool:
    """Whether a file of this name may be one rank's own state dict."""
    return _OF_WORLD.match(name) is not None or _RANK.match(name) is not None


def is_meta_name(name: str) -> bool:
    """Whether a file of this name is one of Meta's parts."""
    return _META.match(name) is not None


def is_torch_shard(name: str) -> bool:
    """Whether a file of this name is one rank's of torch's Hugging Face shards."""
    return _TORCH_SHARD.match(name) is not None


def is_megatron_name(name: str) -> bool:
    """Whether a file of this name (as `split_place` gives it) is what one of Megatron's ranks saves."""
    folder, slash, file = name.rpartition("/")
    return bool(slash) and _RANK_FOLDER.match(folder) is not None and _is_megatron_file(file)


def _is_megatron_file(file: str) -> bool:
    # NeMo names the file after the model.
    return file in _MEGATRON_FILES or (file.endswith(".ckpt") and not is_leftover(file))


def is_only_rank(name: str) -> bool:
    """Whether the name says that its file is of a run on one rank: all of a checkpoint."""
    match = _OF_WORLD.match(name)
    return match is not None and int(match["of"]) == 1 and not is_leftover(name)


def find_parts(names: Iterable[str]) -> list[Parts]:
    """The groups of parts among all names of one folder; a name is in one group at most."""
    everything = list(names)
    known = frozenset(everything)
    mine = sorted(name for name in everything if may_be_part(name))
    found = [
        *_of_meta(mine, known),
        *_of_deepspeed(mine),
        *_of_rank_folders(mine),
        *_of_world(mine),
        *_of_torch(mine),
        *_of_hugging_face(mine, known),
        *_of_chunks(mine, known),
    ]
    claimed = {member for group in found for member in group.members}
    return [*found, *_counted([name for name in mine if name not in claimed])]


_FETCH = "fetch the rest"
_TAKE_FOLDER = "convert the folder, which takes all of them"


def _parts(members: Collection[str], what: str, way_out: str, kind: str = "", missing: str = "") -> Parts:
    return Parts(tuple(members), f"{what} ({listed_names(members)}{missing}); {way_out}", kind)


def listed_names(names: Collection[str], most: int = MAX_LISTED_NAMES) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(itertools.islice(names, most))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _missing(numbers: Collection[int], first: int, count: int, name_of: Callable[[int], str] = str) -> str:
    """The names of those of `count` numbers from `first` on that are not there."""
    missing = [name_of(n) for n in range(first, first + min(count, MAX_COUNTED)) if n not in numbers]
    return f"; not there: {listed_names(missing)}" if missing else ""


def _by(
    pattern: re.Pattern[str], names: Sequence[str], *keys: str
) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    """Names that match and their numbers, in groups of equal `keys`."""
    groups: dict[tuple[str, ...], dict[str, int]] = {}
    for name in names:
        if (match := pattern.match(name)) is not None:
            groups.setdefault(tuple(match[key] for key in keys), {})[name] = int(match["n"])
    yield from groups.items()


def _of_meta(names: Sequence[str], known: Collection[str]) -> Iterator[Parts]:
    for _, group in _by(_META, names, "tail"):
        count = max(group.values()) + 1
        if count == 1:
            continue
        missing = _missing(group.values(), 0, count, "consolidated.{:02d}.pth".format)
        way_out, kind = (_FETCH, "") if missing else (_TAKE_FOLDER, "meta_parts")
        parts = _parts(group, f"Meta's tensor-parallel parts, {count} or more", way_out, kind, missing)
        beside = (META_PARAMETERS,) if META_PARAMETERS in known else ()
        yield replace(parts, members=parts.members + beside)


_DEEPSPEED = {
    "deepspeed_universal": "files of DeepSpeed's universal checkpoint, a folder for each parameter",
    "deepspeed_layers": "files of DeepSpeed's pipeline, each a layer or less of the model",
    "deepspeed_experts": "DeepSpeed's mixture of experts, which lie in files of their own",
    "deepspeed_ranks": "DeepSpeed's model states of tensor-parallel ranks",
}


def _of_deepspeed(names: Sequence[str]) -> Iterator[Parts]:
    kind, found = deepspeed_checkpoint(names)
    members = [name for name in found if not OPTIM_STATES.match(name) and not is_leftover(name)]
    stage_3 = [name for name in names if (match := MODEL_STATES.match(name)) and match["rank"]]
    if stage_3 and kind in ("", "deepspeed_zero", "deepspeed_ranks"):
        what = "DeepSpeed's model states of ZeRO stage 3, whose parameters lie in the *_optim_states.pt files"
        yield _parts(members or stage_3, what, "convert the folder with those files in it")
    elif kind in _DEEPSPEED:
        yield _parts(members, _DEEPSPEED[kind], _TAKE_FOLDER)


def _of_rank_folders(names: Sequence[str]) -> Iterator[Parts]:
    groups: dict[str, dict[str, int]] = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        if slash and (match := _RANK_FOLDER.match(folder)) is not None:
            groups.setdefault(file, {})[name] = max(int(n) for n in match.groups() if n is not None)
    tool = "the framework that trained the model (Megatron, NeMo) has a tool that merges them"
    for file, group in groups.items():
        if len(group) > 1 or max(group.values()) > 0:
            merged = _is_megatron_file(file)
            way_out, kind = (_TAKE_FOLDER, "megatron_parts") if merged else (tool, "")
            yield _parts(group, "files of tensor-, pipeline- or expert-parallel ranks", way_out, kind)


def _of_world(names: Sequence[str]) -> Iterator[Parts]:
    for (stem, of, tail), group in _by(_OF_WORLD, names, "stem", "of", "tail"):
        if (count := int(of)) < 2:
            continue
        missing = _missing(group.values(), 0, count, f"{stem}world_size_{of}_rank_{{}}{tail}".format)
        kind = "" if missing or len(group) != count else "torch_ranks"
        yield _parts(group, f"files of {of} ranks", _FETCH if missing else _TAKE_FOLDER, kind, missing)


def _of_torch(names: Sequence[str]) -> Iterator[Parts]:
    members = [name for name in names if _TORCH_SHARD.match(name)]
    way_out = f"{_TAKE_FOLDER}; where the folder above holds the merged model, leave these out with --exclude"
    if members:
        what = "shards that torch.distributed.checkpoint wrote, one file for each rank"
        yield _parts(members, what, way_out, "hf_shards")


def _of_hugging_face(names: Sequence[str], known: Collection[str]) -> Iterator[Parts]:
    for (stem, of, tail), group in _by(_HF_SHARD, names, "stem", "of", "tail"):
        count = int(of)
        if count < 2 or any(_TORCH_SHARD.match(name) for name in group):
            continue
        index = f"{stem}{tail}{INDEX_SUFFIX}"
        missing = _missing(group.values(), 1, count)
        way_out = f"convert {index} instead, which names them all"
        if index not in known:
            way_out = f"their index {index} is not there; fetch it{' and the rest' if missing else ''}"
        yield _parts(group, f"shards of {count}", way_out, missing=missing)


def _of_chunks(names: Sequence[str], known: Collection[str]) -> Iterator[Parts]:
    if members := [name for name in names if _CHUNKS.match(name)]:
        whole = ".metadata" in known
        way_out = "convert the folder instead" if whole else "their .metadata is not there; fetch it"
        yield _parts(members, "chunks of torch.distributed.checkpoint", way_out)


def _counted(names: Sequence[str]) -> Iterator[Parts]:
    """Files that are counted from 0: rank files of trainers, fairseq's shards."""
    for pattern in _COUNTED:
        for (stem, _), group in _by(pattern, names, "stem", "tail"):
            numbers = sorted(group.values())
            if len(numbers) < 2 or numbers[0] != 0 or _CONTEST.search(stem):
                continue
            merged = _TAKE_FOLDER if pattern is _RANK else "merge them"
            way_out = f"{merged}, or, where each is a whole copy, convert one with --parts"
            kind = "torch_ranks" if pattern is _RANK and numbers == list(range(len(numbers))) else ""
            missing = _missing(numbers, 0, numbers[-1] + 1)
            yield _parts(group, f"files of {len(numbers)} ranks", way_out, kind, missing)
