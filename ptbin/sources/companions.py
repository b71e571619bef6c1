"""Companions: files that go along with a model's weights, told by their names. Pure.

What training leaves next to weights (an optimizer, a scheduler) is a leftover (`leftovers`), no companion.
"""

from __future__ import annotations

import fnmatch

from ptbin.sources.suffixes import CHECKPOINT_SUFFIXES, suffix_of

# transformers' and tokenizers' file names (utils/hub.py, tokenization_utils_base.py), and peft's.
SIDECARS = tuple(
    "config.json generation_config.json adapter_config.json configuration.json"
    " tokenizer.json tokenizer_config.json tokenizer.model *.tiktoken special_tokens_map.json"
    " added_tokens.json vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model"
    " preprocessor_config.json processor_config.json image_processor_config.json"
    " video_preprocessor_config.json chat_template.json chat_template.jinja".split()
)
COMPANIONS = (
    *("README*", "LICENSE*", "LICENCE*", "NOTICE*"),
    *("*.json", "*.txt", "*.md", "*.yaml", "*.yml", "*.toml", "*.jinja"),
)


def is_sidecar(path: str) -> bool:
    """Whether Hugging Face's libraries look for a file of this name next to a model's weights."""
    return _is_one_of(path, SIDECARS)


def is_companion(path: str) -> bool:
    """Whether a file goes along: a sidecar, or a text about the model that is not called a checkpoint."""
    if is_sidecar(path):
        return True
    return suffix_of(path.rpartition("/")[2]) not in CHECKPOINT_SUFFIXES and _is_one_of(path, COMPANIONS)


def _is_one_of(path: str, patterns: tuple[str, ...]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
