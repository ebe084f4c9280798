"""Numbers out of arrays: pure functions, chunked and exact, that know nothing of models or files.

They take tensors and NumPy arrays alike.

One tie rule holds everywhere (`eval/metrics/ranking.py`): scores that are equal up to rounding stand in
random order, and a metric is its expectation over that order. So a model whose scores are all equal
measures chance, neither 0% nor 100%.
"""

from eval.metrics.bootstrap import bootstrap_interval as bootstrap_interval
from eval.metrics.calibration import Reliability as Reliability
from eval.metrics.calibration import expected_calibration_error as expected_calibration_error
from eval.metrics.calibration import reliability as reliability
from eval.metrics.classification import accuracy as accuracy
from eval.metrics.classification import confusion_matrix as confusion_matrix
from eval.metrics.classification import label_ranks as label_ranks
from eval.metrics.classification import mean_per_class_recall as mean_per_class_recall
from eval.metrics.correlation import pearson as pearson
from eval.metrics.correlation import spearman as spearman
from eval.metrics.doubly_right import Candidates as Candidates
from eval.metrics.doubly_right import DoublyRight as DoublyRight
from eval.metrics.doubly_right import Judged as Judged
from eval.metrics.doubly_right import doubly_right as doubly_right
from eval.metrics.doubly_right import judged as judged
from eval.metrics.kendall import kendall_tau as kendall_tau
from eval.metrics.matching import cluster_accuracy as cluster_accuracy
from eval.metrics.multi_label import LabelPrecision as LabelPrecision
from eval.metrics.multi_label import label_average_precision as label_average_precision
from eval.metrics.paired import PairedDifference as PairedDifference
from eval.metrics.paired import paired_difference as paired_difference
from eval.metrics.per_class import ClassTable as ClassTable
from eval.metrics.per_class import class_iou as class_iou
from eval.metrics.per_class import class_table as class_table
from eval.metrics.per_class import macro_f1 as macro_f1
from eval.metrics.per_class import mean_iou as mean_iou
from eval.metrics.ranking import Ranks as Ranks
from eval.metrics.ranking import expected_rank as expected_rank
from eval.metrics.ranking import hit_probability as hit_probability
from eval.metrics.relevance import PositivePositions as PositivePositions
from eval.metrics.relevance import SameLabel as SameLabel
from eval.metrics.relevance import positive_positions as positive_positions
from eval.metrics.retrieval import RetrievalRanks as RetrievalRanks
from eval.metrics.retrieval import retrieval_ranks as retrieval_ranks
from eval.metrics.retrieval import retrieval_recall as retrieval_recall
from eval.metrics.separation import Separation as Separation
from eval.metrics.separation import separation as separation

__all__ = [
    "Candidates",
    "ClassTable",
    "DoublyRight",
    "Judged",
    "LabelPrecision",
    "PairedDifference",
    "PositivePositions",
    "Ranks",
    "Reliability",
    "RetrievalRanks",
    "SameLabel",
    "Separation",
    "accuracy",
    "bootstrap_interval",
    "class_iou",
    "class_table",
    "cluster_accuracy",
    "confusion_matrix",
    "doubly_right",
    "expected_calibration_error",
    "expected_rank",
    "hit_probability",
    "judged",
    "kendall_tau",
    "label_average_precision",
    "label_ranks",
    "macro_f1",
    "mean_iou",
    "mean_per_class_recall",
    "paired_difference",
    "pearson",
    "positive_positions",
    "reliability",
    "retrieval_ranks",
    "retrieval_recall",
    "separation",
    "spearman",
]
