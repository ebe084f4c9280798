"""Texts to token ids: open_clip's tokenizers, without the ten seconds that importing open_clip takes.

A tokenizer id names the vocabulary and the cleaning, e.g. `open_clip:clip_bpe` or
`hf:timm/ViT-B-16-SigLIP?clean=canonicalize`. Equal ids give equal ids for a text, so shards store token ids under
it. The context length is not part of it: a list cut to a shorter context stays right (see `cut`).
"""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

import numpy as np
import torch
from torch import Tensor

from vlkit.errors import ModelError
from vlkit.models.catalogue import open_clip_part

CLIP_BPE = "open_clip:clip_bpe"
NO_TEXT = "none:images_only"  # of encoders without a text tower
CLIP_CONTEXT_LENGTH = 77
CLIP_VOCABULARY = 49408


class Vocabulary(ABC):
    """Texts to ragged lists of ids, start and end tokens included, and back to a padded tensor."""

    tokenizer_id: str
    pad_id: int

    @abstractmethod
    def encode_ragged(self, texts: Sequence[str], context_length: int | None = None) -> list[list[int]]:
        """Token ids of each text without padding; a longer one is cut and keeps its end token."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what open_clip needs to find this tokenizer again in a `local-dir:` folder."""


class TextTokenizer:
    """Texts -> tokens (R,T) for one encoder. Small and picklable: it may be handed to worker processes.

    Args:
        tokenizer_id: names the vocabulary, see the module's head.
        context_length: the most tokens the text tower takes.
        full_context: pad every text to the context length, for towers that look at padding; else T is the
            longest text of the list.
        folder: where the files of a tokenizer from the hub lie, when not in the hub's cache.
    """

    def __init__(
        self, tokenizer_id: str, context_length: int, full_context: bool = False, folder: Path | None = None
    ) -> None:
        self.tokenizer_id = tokenizer_id
        self.context_length = context_length
        self.full_context = full_context
        self.folder = folder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens (R,T) int64, padded on the right."""
        return self.pad(self.encode_ragged(texts))

    def encode_ragged(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, start and end included, no padding, cut to the context length."""
        return self.vocabulary.encode_ragged(texts, self.context_length)

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, start and end included, no padding, not cut."""
        return self.vocabulary.encode_ragged(texts)

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Ragged ids -> (R,T) int64; rows longer than the context are cut and keep their end token."""
        rows = [cut(row, self.context_length) for row in rows]
        width = self.context_length if self.full_context else max(map(len, rows), default=1)
        out = np.full((len(rows), width), self.vocabulary.pad_id, dtype=np.int64)  # torch is slow row by row
        for number, row in enumerate(rows):
            out[number, : len(row)] = row
        return torch.from_numpy(out)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary behind it, loaded once per process."""
        return get_tokenizer(self.tokenizer_id, self.folder)


def cut(row: Sequence[int], context_length: int) -> Sequence[int]:
    """A list of ids cut to the context length; the last id stays the end token."""
    if len(row) <= context_length:
        return row
    return [*row[: context_length - 1], row[-1]]


@lru_cache(maxsize=8)
def get_tokenizer(tokenizer_id: str, folder: Path | None = None) -> Vocabulary:
    """The vocabulary an id names.

    Args:
        tokenizer_id: see the module's head.
        folder: where the files of a tokenizer from the hub lie, when not in the hub's cache.

    Raises:
        ModelError: the id is unknown, or its files cannot be had.
    """
    scheme, _, rest = tokenizer_id.partition(":")
    name, _, query = rest.partition("?")
    options = {key: json.loads(value) for key, value in parse_qsl(query)}
    if f"{scheme}:{name}" == CLIP_BPE:
        return ClipBpe(tokenizer_id, options)
    if tokenizer_id == NO_TEXT:
        raise ModelError(
            "This model embeds images only and takes no texts. Use it for probes, kNN and image retrieval; for texts "
            "take a CLIP model (`vlkit models`)."
        )
    if scheme == "hf" and name:
        return HubTokenizer(tokenizer_id, str(folder or unquote(name)), options)
    raise ModelError(f"Unknown tokenizer {tokenizer_id!r}. Valid: {CLIP_BPE}, or hf:org/name.")


def tokenizer_id_of(text_cfg: Mapping[str, Any]) -> str:
    """The id of the tokenizer that an open_clip text configuration asks for."""
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    if text_cfg.get("tokenizer_mode"):
        options["tokenizer_mode"] = text_cfg["tokenizer_mode"]
    hub_name = text_cfg.get("hf_tokenizer_name")
    base = "hf:" + quote(str(hub_name), safe="/") if hub_name else CLIP_BPE
    query = urlencode({key: json.dumps(options[key]) for key in sorted(options)})
    return f"{base}?{query}" if query else base


class ClipBpe(Vocabulary):
    """OpenAI's byte-pair encoding by open_clip's SimpleTokenizer, with the ids of whole words kept.

    Gives the ids of `open_clip.SimpleTokenizer`, several times faster: plain ASCII text skips the repair of
    encodings and HTML entities, which cannot change it, and each word is looked up once.
    """

    pad_id = 0

    def __init__(self, tokenizer_id: str, options: Mapping[str, Any]) -> None:
        self.tokenizer_id = tokenizer_id
        try:
            self._bpe = open_clip_part("tokenizer").SimpleTokenizer(**options)
        except (TypeError, AssertionError) as error:
            raise ModelError(f"Tokenizer {tokenizer_id} has options open_clip does not know: {error}.") from error
        self._lower_only = options.get("clean", "lower") == "lower"
        self._words: dict[str, tuple[int, ...]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: a worker process looks it up for itself, and so many tasks share one there.
        return get_tokenizer, (self.tokenizer_id,)

    def encode_ragged(self, texts: Sequence[str], context_length: int | None = None) -> list[list[int]]:
        """Token ids of each text, `<start_of_text>` and `<end_of_text>` included."""
        start, end = self._bpe.sot_token_id, self._bpe.eot_token_id
        rows = ([start, *self._encode(text), end] for text in texts)
        return [list(cut(row, context_length or len(row))) for row in rows]

    def save(self, folder: Path) -> None:
        """Nothing to write: the vocabulary is part of open_clip."""

    def _encode(self, text: str) -> list[int]:
        if self._lower_only and _is_plain(text):
            text = " ".join(text.split()).lower()
        else:
            text = self._bpe.clean_fn(text)
        ids: list[int] = []
        for word in self._bpe.pat.findall(text):
            known = self._words.get(word)
            ids.extend(self._learn(word) if known is None else known)
        return ids

    def _learn(self, word: str) -> tuple[int, ...]:
        encoded = "".join(self._bpe.byte_encoder[byte] for byte in word.encode("utf-8"))
        ids = tuple(self._bpe.encoder[piece] for piece in self._bpe.bpe(encoded).split(" "))
        # Bounded, so that captions full of numbers and addresses cannot fill the memory.
        if len(self._words) < 1_000_000:
            self._words[word] = ids
        return ids


class HubTokenizer(Vocabulary):
    """A tokenizer of transformers, through open_clip's HFTokenizer, from the hub's cache or a folder."""

    def __init__(self, tokenizer_id: str, source: str, options: Mapping[str, Any]) -> None:
        self.tokenizer_id = tokenizer_id
        try:
            self._tokenizer = open_clip_part("tokenizer").HFTokenizer(source, context_length=None, **options)
        except Exception as error:  # transformers raises OSError, ValueError, ImportError and its own types
            raise ModelError(
                f"The tokenizer {source} cannot be loaded ({(str(error) or repr(error)).splitlines()[0]}). Without a "
                "network, put its files (tokenizer.json, tokenizer_config.json) into the Hugging Face cache, or into "
                "the model's `local-dir:` folder."
            ) from error
        self.pad_id = int(self._tokenizer.tokenizer.pad_token_id or 0)
        # transformers changes its tokenizer while it cuts texts; a checkpoint is written in a thread of its own.
        self._lock = threading.Lock()

    def encode_ragged(self, texts: Sequence[str], context_length: int | None = None) -> list[list[int]]:
        """Token ids of each text with the special tokens this tokenizer adds, padding taken off."""
        with self._lock:
            rows: Tensor = self._tokenizer(list(texts), context_length=context_length or CLIP_CONTEXT_LENGTH)
        return [_without_padding(row, self.pad_id) for row in rows.tolist()]

    def save(self, folder: Path) -> None:
        """The tokenizer's own files: open_clip reads them from the folder for `local-dir:` models."""
        with self._lock:
            self._tokenizer.save_pretrained(str(folder))


def _without_padding(row: list[int], pad_id: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad_id:
        end -= 1
    return row[:end]


def _is_plain(text: str) -> bool:
    # What ftfy and html.unescape leave as it is: printable ASCII without an entity's ampersand.
    return text.isascii() and "&" not in text and text.replace("\n", " ").replace("\t", " ").isprintable()
