"""Which texts an image has in an epoch: fields and their weights, sub-captions, templates for class labels.

    CaptionChoice(fields=(("caption", 0.7), ("synthetic", 0.3)))       # one caption, from fields of the .json
    CaptionChoice(fields=(("long_caption", 1.0),), sub_captions=4)     # four parts of a long one, other ones each epoch
    CaptionChoice(templates=("a photo of a {}.", "a drawing of a {}."), class_names=("cat", "dog"))

Every draw follows from (seed, epoch, sample). A caption's chance is its field's weight, shared by the captions of that
field; fields an image lacks, or has empty, take no part. `txt` names the captions in the `.txt` file.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlkit.data.captions import Text, choose_captions
from vlkit.data.randomness import fleeting_generator, generator
from vlkit.data.shard_index import ShardIndex, ShardSet
from vlkit.errors import DataError, did_you_mean
from vlkit.escape import one_line

TXT = "txt"

_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\s*\n\s*")  # noqa: RUF001 (full-width marks are meant)
_LOOKED_AT = 100


class Draw(NamedTuple):
    """What decides a random choice about a sample."""

    seed: int
    epoch: int
    sample_id: int


@dataclass(frozen=True)
class CaptionChoice:
    """How the texts of an image are chosen.

    Attributes:
        per_image: captions (or templates) taken of each image, fewer where it has fewer.
        fields: names of fields with their weights; empty: the captions `ShardIndex.captions` finds.
        sub_captions: so many parts of the captions taken are the texts, in place of the captions; 0: whole captions.
        most_sentences: of one part.
        templates: with `{}` for the class name; the texts are these, filled in.
        class_names: name of each class number of the `.cls` file.
        class_field: field of the `.json` file with the class name, in place of the `.cls` file.
    """

    per_image: int = 1
    fields: tuple[tuple[str, float], ...] = ()
    sub_captions: int = 0
    most_sentences: int = 3
    templates: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    class_field: str | None = None

    def texts(self, shard: ShardIndex, i: int, tokenizer_id: str, draw: Draw) -> list[Text]:
        """The texts of a sample, with their token ids where the shard has them for this tokenizer.

        Raises:
            DataError: its captions or its label cannot be read.
        """
        if self.templates:
            name = self._class_name(shard, i)
            chosen = choose_captions(len(self.templates), self.per_image, **draw._asdict())
            return [Text(self.templates[n].replace("{}", name), None) for n in chosen]
        captions = self._captions(shard, i, tokenizer_id, draw)
        if not self.sub_captions:
            return captions
        sentences = [sentence for caption in captions for sentence in split_sentences(caption.text)]
        random = generator(*draw, "sub-captions")
        parts = sub_captions(sentences, self.sub_captions, self.most_sentences, random)
        return [Text(part, None) for part in parts]

    def _captions(self, shard: ShardIndex, i: int, tokenizer_id: str, draw: Draw) -> list[Text]:
        found: list[Text] = []
        weights: list[float] = []
        for field, weight in self.fields or ((None, 1.0),):
            texts = shard.captions(i) if field is None else texts_of_field(shard, i, field)
            stored = shard.tokens(tokens_name(tokenizer_id, field), i)
            usable = stored is not None and len(stored) == len(texts)
            for n, text in enumerate(texts):
                found.append(Text(text, stored[n].tolist() if usable and stored is not None else None))
                weights.append(weight / len(texts))
        if not self.fields:
            chosen = choose_captions(len(found), self.per_image, **draw._asdict())
        else:
            chosen = weighted_choice(weights, self.per_image, draw)
        return [found[n] for n in chosen]

    def _class_name(self, shard: ShardIndex, i: int) -> str:
        where = f"shard {shard.path.name}, sample {shard.key(i)}"
        if self.class_field is not None:
            value = (shard.json(i) or {}).get(self.class_field)
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"{where}: .json has no text under {self.class_field!r} for the templates.")
            return value.strip().replace("_", " ")
        label = shard.label(i)
        if label is None:
            raise DataError(f"{where}: no .cls file, so there is no class name for the templates.")
        if label >= len(self.class_names):
            raise DataError(f"{where}: the label is {label}, but there are {len(self.class_names)} class names.")
        return self.class_names[label]


def tokens_name(tokenizer_id: str, field: str | None) -> str:
    """Under what name a sidecar keeps the token ids of a field's captions."""
    return tokenizer_id if field in (None, TXT) else f"{tokenizer_id}@{field}"


def weighted_choice(weights: Sequence[float], wanted: int, draw: Draw) -> list[int]:
    """Positions of `wanted` different items; the first by weight, the next by weight among the others, and so on.

    Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", algorithm A.
    """
    draws = fleeting_generator(*draw, "captions by weight").random(len(weights))
    keys = np.log1p(-draws) / np.asarray(weights)
    return [int(i) for i in np.argsort(-keys, kind="stable")[:wanted]]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text: parted at line ends and at . ! ? before white space. Abbreviations part it too."""
    return [sentence for part in _SENTENCE_ENDS.split(text) if (sentence := part.strip())]


def sub_captions(sentences: Sequence[str], wanted: int, most: int, random: np.random.Generator) -> list[str]:
    """Texts of one to `most` sentences each, drawn alike; several are neighbours or from anywhere, evens.

    Source: Xiao et al. 2024, "FLAIR: VLM with Fine-grained Language-informed Image Representations",
        arXiv:2412.03561, section 3.1 (diverse captions); Zheng et al. 2024, "DreamLIP: Language-Image Pre-training with
        Long Captions", arXiv:2403.17007, section 3.2 (sub-captions): `most` = 1.
    Differs: sentences from anywhere keep their order; equal texts come once, so an image of few sentences has fewer
        than `wanted`.
    """
    texts: dict[str, None] = {}
    for _ in range(wanted if sentences else 0):
        count = min(int(random.integers(1, most + 1)), len(sentences))
        if random.random() < 0.5:
            first = int(random.integers(len(sentences) - count + 1))
            chosen = list(range(first, first + count))
        else:
            chosen = sorted(random.permutation(len(sentences))[:count].tolist())
        texts[" ".join(sentences[n] for n in chosen)] = None
    return list(texts)


def check_fields(shards: ShardSet, choice: CaptionChoice) -> None:
    """Look for the fields in the first samples, so that a mistyped one is found before training.

    Raises:
        DataError: a field is in none of them.
    """
    if not choice.fields and choice.class_field is None:
        return
    rows = [shards.locate(i) for i in range(min(_LOOKED_AT, shards.num_samples))]
    there = {name for shard, i in rows for name in _names_in(shard, i)}
    for name in [*(field for field, _ in choice.fields), *([choice.class_field] if choice.class_field else [])]:
        if name not in there:
            raise DataError(
                f"None of the first {len(rows)} samples has a caption field {name!r}. "
                f"{did_you_mean(name, sorted(one_line(found, 40) for found in there))}"
            )


def _names_in(shard: ShardIndex, i: int) -> Iterator[str]:
    if shard.column("caption_offset")[i] >= 0:
        yield TXT
    try:
        yield from shard.json(i) or {}
    except DataError:
        return


def texts_of_field(shard: ShardIndex, i: int, field: str) -> list[str]:
    """The captions in a field: a text, or a list of texts."""
    if field == TXT:
        return list(shard.captions(i)) if shard.column("caption_offset")[i] >= 0 else []
    value = (shard.json(i) or {}).get(field)
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
