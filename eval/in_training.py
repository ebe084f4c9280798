"""Evaluations during training: from the run file's [[eval]] sections to entries of `fit`'s `every`.

run = load_run("run.toml")
pretrain(run, every=make_every(run))

With several processes all make these entries: each embeds its share of the images and texts, or works through its
share of the photographs; the main one scores, and all get its numbers.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from eval.in_training_source import InTrainingSource, PixelCache
from eval.protocol_data import Prepared, prepare, wds_protocol
from eval.protocols import Protocol, find_protocol
from eval.training_evaluators import build_evaluator
from vlkit.config import EvalSettings, RunConfig
from vlkit.contracts import Evaluation, Evaluator
from vlkit.distributed import from_main, is_main
from vlkit.errors import ConfigError, VlkitError
from vlkit.training.loop import Every, Moment

_log = logging.getLogger(__name__)

# Their keys need no name before them.
_PLAIN = (None, "retrieval", "classification")
WDS = "wds"  # the protocol that a folder in CLIP_benchmark's layout brings with it


def make_every(run: RunConfig) -> list[Every]:
    """One entry for each [[eval]] of a run, in their order.

    Each returns the evaluator's fractions to the loop, under the evaluator's own keys: as they are for retrieval,
    classification and protocols, else behind its name, as `knn/accuracy@1`. Where two sections run the same
    evaluation, their data's name stands before that: `val/text_to_image/recall@1`.

    Raises:
        ConfigError: an unknown protocol or evaluator, an option it has not, two sections with the same keys.
        DataError: data that is missing or cannot be evaluated: before training starts.
    """
    count = Counter(_kind(section) for section in run.eval)
    prefixes = [_prefix(section, several=count[_kind(section)] > 1) for section in run.eval]
    for section, prefix in zip(run.eval, prefixes, strict=True):
        if count[_kind(section)] > 1 and prefixes.count(prefix) > 1:
            raise ConfigError(
                f"Two [[eval]] sections would both write {prefix}...: the same evaluation of data named alike. "
                "Leave one out, or give the data another name."
            )
    return [
        Every(section.every, _Evaluation(section, prefix)) for section, prefix in zip(run.eval, prefixes, strict=True)
    ]


class _Evaluation:
    """One [[eval]] section: reads its data at once, its images at the first call."""

    def __init__(self, section: EvalSettings, prefix: str) -> None:
        self.prefix = prefix
        self.evaluator = _evaluator(section)
        self.cache = PixelCache()
        self.reported = False

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Evaluate the encoder as it is now. All processes call this; the metrics are the same in all."""
        source = InTrainingSource(moment.encoder, self.cache)
        if not is_main():
            source.serve()
            return _outcome(None)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            # An evaluator may draw numbers; those of the training must not depend on it.
            with torch.random.fork_rng(devices):
                found: Mapping[str, float] | VlkitError = self._fractions(self.evaluator.run(source))
        except VlkitError as error:  # of a model that lacks what is measured, for instance: all of them stop
            found = error
        finally:  # also on an error of ours: the others must not wait for more
            source.dismiss()
        return _outcome(found)

    def _fractions(self, evaluation: Evaluation) -> Mapping[str, float]:
        unreadable = evaluation.figures.get("unreadable_images", ())
        if unreadable and not self.reported:
            _log.warning("%d evaluation images cannot be read (first: %s: %s).", len(unreadable), *unreadable[0])
            self.reported = True
        # Ranks are no fractions; they would press the curves of a plot flat. What is undefined is no number.
        return {
            self.prefix + key: value
            for key, value in evaluation.metrics.items()
            if not key.endswith("rank") and math.isfinite(value)
        }


def _outcome(found: Mapping[str, float] | VlkitError | None) -> Mapping[str, float]:
    """What the main process found, in all of them; its error is raised in all of them."""
    shared = from_main(found)
    if isinstance(shared, VlkitError):
        raise shared
    return dict(shared)


def _evaluator(section: EvalSettings) -> Evaluator | Prepared:
    if section.protocol is None:
        return build_evaluator(section)
    return prepare(_protocol(section), _place(section), images=section.images)


def _protocol(section: EvalSettings) -> Protocol:
    if section.protocol == WDS:
        return wds_protocol(_place(section))
    return find_protocol(section.protocol or "")


def _place(section: EvalSettings) -> str:
    return section.data if isinstance(section.data, str) else "::".join(section.data)


def _kind(section: EvalSettings) -> str:
    """What decides a section's keys: two of a kind are told apart by their data."""
    return section.name or _protocol(section).task


def _prefix(section: EvalSettings, several: bool) -> str:
    own = "" if section.name in _PLAIN else f"{section.name}/"
    return f"{_stem(section)}/{own}" if several else own


def _stem(section: EvalSettings) -> str:
    if section.protocol is not None:
        return _protocol(section).name
    return Path(_place(section)).stem + (f"_{section.split}" if section.split else "")
