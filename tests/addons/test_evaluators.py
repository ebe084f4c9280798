"""Evaluators with add-ons: what they fit, what they refuse, what they write into the result."""

import ast
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from eval.addons import classification_bench, compare_addons, leaderboard_sections, retrieval_bench
from eval.classification import ClassificationEvaluator
from eval.methods import METHODS
from eval.report import Table
from eval.retrieval import RetrievalEvaluator
from vlkit.addons.adapt import captioned_reference, labelled_reference
from vlkit.addons.base import Need, Term, Vectors, learned
from vlkit.addons.class_names import parse_class
from vlkit.addons.gallery_bias.mean import Mean
from vlkit.addons.gallery_bias.top_k_mean import TopKMean
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.errors import ConfigError, DataError

NAMES = ["cat", "dog", "sea horse"]


@dataclass(frozen=True)
class OfTheTestSet(Term):
    """Transductive: keeps the mean of the test images."""

    needs: ClassVar[frozenset[Need]] = frozenset({"test_stream"})
    mean: Tensor | None = learned()

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        assert reference.images is None and not hasattr(reference.stream, "labels")
        return replace(self, mean=reference.stream.vectors.pooled.mean(0))

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits)


def test_plain_through_passes_is_plain(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), toy_records(NAMES, 5)
    passes = Passes(source)
    for evaluator in (ClassificationEvaluator(records, NAMES), RetrievalEvaluator(records)):
        assert replace(evaluator, passes=passes).run(source).metrics == evaluator.run(source).metrics  # type: ignore[type-var,attr-defined]
    assert passes.num_passes == 1


def test_transductive_add_ons_get_the_test_images_and_are_marked(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), toy_records(NAMES, 5)
    found = ClassificationEvaluator(records, NAMES).run(source, Pipeline([OfTheTestSet()]))
    assert found.protocol["transductive"] is True
    assert found.protocol["addons"][0]["fitted_on"] == {"test_stream": "test: 15, unlabelled"}


def test_what_needs_data_is_fitted_on_the_reference_or_refused(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), toy_records(NAMES, 5)
    reference, _ = captioned_reference(Passes(source), toy_records(NAMES, 20, first=100))
    evaluator = RetrievalEvaluator(records, reference=reference)
    found = evaluator.run(source, Pipeline([Mean(lam=30.0)]))
    assert found.protocol["addons"][0]["fitted_on"] == {"captions": "train: 60", "unlabelled_images": "train: 60"}
    plain = evaluator.run(source)
    assert found.per_item is not None and plain.per_item is not None
    assert found.per_item.column("rank") != plain.per_item.column("rank")
    with pytest.raises(ConfigError, match="needs a bank of queries"):
        RetrievalEvaluator(records).run(source, Pipeline([Mean()]))
    with pytest.raises(ConfigError, match="not for retrieval"):
        evaluator.run(source, Pipeline([OfTheTestSet()]))


def test_a_bias_of_one_gallery_leaves_the_other_direction_alone(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), toy_records(NAMES, 5)
    reference, _ = captioned_reference(Passes(source), toy_records(NAMES, 20, first=100))
    # Without images there is no bank for texts; all captions of a class are alike, so only their images move.
    fitted = Pipeline([Mean(lam=2.0)]).fit(reference, source)
    plain, found = RetrievalEvaluator(records).run(source), RetrievalEvaluator(records).run(source, fitted)
    ranks = {}
    for name, evaluation in (("plain", plain), ("found", found)):
        assert evaluation.per_item is not None
        rows = evaluation.per_item.to_pylist()
        ranks[name] = [row["rank"] for row in rows if row["direction"] == "text_to_image"]
    assert ranks["plain"] != ranks["found"]


def test_a_text_prefix_goes_before_every_caption(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), toy_records(NAMES, 5)
    plain, found = (RetrievalEvaluator(records, text_prefix=words).run(source) for words in ("", "A photo depicts "))
    assert plain.metrics != found.metrics and found.protocol["templates"] == "A photo depicts {}"
    assert plain.protocol["templates_hash"] != found.protocol["templates_hash"]


def test_few_shots_are_held_out_and_the_rest_is_tested(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), [*toy_records(NAMES, 12), *toy_records(["broken cat"], 1)]
    passes = Passes(source)
    bench, drawn = classification_bench(passes, records, NAMES, shots=4, seed=1)
    keys = [set(drawn.train), set(drawn.val), {record.key for record in bench.test}]
    assert [len(one) for one in keys] == [12, 12, 12] and not keys[0] & keys[1] and not keys[2] & (keys[0] | keys[1])
    # Unlabelled images are not the test images: whoever sees those must declare it.
    assert bench.reference.images is not None
    assert not {record.key for record in bench.reference.images.records} & keys[2]
    assert drawn.unreadable == (("broken cat#0", "broken"),)
    again, _ = classification_bench(passes, records, NAMES, shots=4, seed=1)
    assert again.test == bench.test
    with pytest.raises(DataError, match="too few for 13 shots"):
        labelled_reference(passes, records, [parse_class(name) for name in NAMES], shots=13)
    reference, drawn = labelled_reference(passes, records, [parse_class(name) for name in NAMES], shots=11)
    assert reference.val is None and "too few to hold 4 out" in drawn.notes[0]


def test_twenty_add_ons_share_one_pass(tiny_source: Any, toy_records: Any) -> None:
    source, records = tiny_source(), toy_records(NAMES, 12)
    passes = Passes(source)
    bench, _ = classification_bench(passes, records, NAMES, shots=4)
    board = compare_addons(bench, source, passes, [Mean(lam=number / 20) for number in range(20)])
    assert len(board.rows) == 21 and board.left_out == {}
    assert passes.num_passes == 1 and source.images_read == 36
    assert board.rows[0].name == "plain"
    nothing = next(row for row in board.rows[1:] if row.metrics == board.rows[0].metrics)
    assert nothing.differences["accuracy@1"].difference == 0.0


class ReadsImages(Mean):
    """Reads further images while it is fitted."""

    needs: ClassVar[frozenset[Need]] = frozenset({"pixels"})
    further: ClassVar[list[Any]] = []

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        reference.passes.read(self.further)
        return super().learn(reference, embedder, progress)


def test_image_passes_are_in_no_rows_time(tiny_source: Any, toy_records: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, records = tiny_source(), toy_records(NAMES, 12)
    monkeypatch.setattr("time.perf_counter", lambda: float(source.images_read))  # an image takes a second
    passes = Passes(source)
    bench, _ = classification_bench(passes, records, NAMES, shots=4)
    ReadsImages.further = toy_records(NAMES, 5, first=100)
    board = compare_addons(bench, source, passes, [ReadsImages()])
    assert board.left_out == {} and passes.num_passes == 2
    assert board.pass_seconds == passes.seconds == source.images_read == 36 + 15
    assert board.rows[1].fit_seconds == 0
    metrics, needs = leaderboard_sections(board)
    assert isinstance(metrics, Table) and isinstance(needs, Table)
    assert metrics.columns == ["add-on", "accuracy@1", "change"] and "took 51 s" in needs.note
    assert needs.rows[1] == ["test_evaluators", "gallery_bias", "captions, pixels, unlabelled images", "0.00", "0.00"]


def test_retrieval_is_fitted_on_train(tiny_source: Any, toy_records: Any) -> None:
    source = tiny_source()
    records = [replace(record, split="train") for record in toy_records(NAMES, 9)]
    with pytest.raises(DataError, match="no captioned images of split test"):
        retrieval_bench(Passes(source), records)
    records += [replace(record, split="test") for record in toy_records(NAMES, 5, first=50)]
    passes = Passes(source)
    board = compare_addons(retrieval_bench(passes, records), source, passes, [Mean(), TopKMean()])
    assert [row.name for row in board.rows] == ["plain", "mean"] and "k = 128" in board.left_out["top_k_mean"]
    assert passes.num_images == 42
    page = leaderboard_sections(board)
    assert [section.title for section in page] == ["Text to image", "Image to text", "Needs and times", "Left out"]
    assert isinstance(page[1], Table)
    assert page[1].columns == ["add-on", "recall@10", "change", "recall@1", "change"]


def test_every_evaluator_has_a_row() -> None:
    folder = Path(sys.modules[RetrievalEvaluator.__module__].__file__ or "").parent
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Evaluator" for base in node.bases):
                found.add(path.stem)
    assert found <= METHODS.keys(), sorted(found - METHODS.keys())
    assert all((folder / f"{name}.py").is_file() and row.name == name for name, row in METHODS.items())
