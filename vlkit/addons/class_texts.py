"""Texts about classes, several a class: read from a user's file, and made class weights.

table = read_class_texts("descriptions.json")            # {"hen": ["two legs", "a red comb"], ...}
texts = texts_of(classes, table, "descriptions.json")     # in the order of the classes
weights = mean_of_similarities(embedder, texts)
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_names import ClassName
from vlkit.addons.class_weights.templates import TextEmbedder
from vlkit.addons.exchange import ClassWeights
from vlkit.errors import ConfigError, DataError, did_you_mean


def mean_of_similarities(embedder: TextEmbedder, texts: Sequence[Sequence[str]]) -> ClassWeights:
    """A class scores the mean similarity of its texts.

    Args:
        embedder: gives unit vectors.
        texts: of each class, at least one.
    """
    vectors = embedder.embed_texts([text for of_class in texts for text in of_class])
    return ClassWeights(vectors, _class_of(texts), reduce="mean")


def mean_of_features(embedder: TextEmbedder, texts: Sequence[Sequence[str]]) -> ClassWeights:
    """A class is the mean of its texts' vectors, brought to unit norm again: one vector a class.

    Beside `mean_of_similarities` each class's score is divided by the length of the mean, so classes whose texts differ
    much come out higher.
    """
    vectors = embedder.embed_texts([text for of_class in texts for text in of_class])
    sums = torch.zeros(len(texts), vectors.shape[1]).index_add(0, _class_of(texts), vectors)
    return ClassWeights(F.normalize(sums, dim=-1), torch.arange(len(texts)))


def read_class_texts(file: str, who: str) -> dict[str, list[str]]:
    """The texts of a JSON file: an object of class name -> list of texts.

    Args:
        file: its path.
        who: the add-on, for messages.

    Raises:
        ConfigError: no file is named, or it is not there.
        DataError: it is no such object, or a class has no text.
    """
    if not file:
        raise ConfigError(f"{who} needs a file of texts for each class: --addon {who}:file=texts.json")
    try:
        table = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{who} cannot read {file}: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f'{file} is no JSON ({error}). {who} expects {{"class name": ["text", ...], ...}}.') from error
    if not isinstance(table, dict) or not table:
        raise DataError(f'{file} holds no object of classes; {who} expects {{"class name": ["text", ...], ...}}.')
    for name, texts in table.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{file}: {name!r} is not followed by a list of texts. Write a list of non-empty strings.")
        if not texts:
            raise DataError(f"{file}: {name!r} has no text. Write at least one, or leave the class out.")
    return table


def texts_of(classes: Sequence[ClassName], table: Mapping[str, Sequence[str]], where: str) -> list[list[str]]:
    """The texts of each class; any of its names finds them, letter case and underscores aside.

    Raises:
        DataError: a class that the table lacks; names the first, and what is like it.
    """
    by_name = {_plain(name): list(texts) for name, texts in table.items()}
    found = [next((by_name[_plain(one)] for one in item.names if _plain(one) in by_name), None) for item in classes]
    missing = [item.shown for item, texts in zip(classes, found, strict=True) if texts is None]
    if missing:
        raise DataError(
            f"{where} lacks {len(missing)} of {len(classes)} classes (first: {missing[0]!r}). "
            f"{did_you_mean(missing[0], table)} Add texts for every class."
        )
    return [texts for texts in found if texts is not None]


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def _class_of(texts: Sequence[Sequence[str]]) -> Tensor:
    return torch.tensor([place for place, of_class in enumerate(texts) for _ in of_class])
