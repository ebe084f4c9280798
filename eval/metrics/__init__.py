"""Numbers out of arrays: pure functions on tensors, chunked and exact, that know nothing of models or files.

One tie rule holds everywhere (`eval/metrics/ranking.py`): scores that are equal up to rounding stand in
random order, and a metric is its expectation over that order. So a model whose scores are all equal
measures chance, neither 0% nor 100%.
"""

from eval.metrics.bootstrap import bootstrap_interval as bootstrap_interval
from eval.metrics.classification import accuracy as accuracy
from eval.metrics.classification import confusion_matrix as confusion_matrix
from eval.metrics.classification import label_ranks as label_ranks
from eval.metrics.classification import mean_per_class_recall as mean_per_class_recall
from eval.metrics.ranking import Ranks as Ranks
from eval.metrics.ranking import expected_rank as expected_rank
from eval.metrics.ranking import hit_probability as hit_probability
from eval.metrics.retrieval import RetrievalRanks as RetrievalRanks
from eval.metrics.retrieval import retrieval_ranks as retrieval_ranks
from eval.metrics.retrieval import retrieval_recall as retrieval_recall

__all__ = [
    "Ranks",
    "RetrievalRanks",
    "accuracy",
    "bootstrap_interval",
    "confusion_matrix",
    "expected_rank",
    "hit_probability",
    "label_ranks",
    "mean_per_class_recall",
    "retrieval_ranks",
    "retrieval_recall",
]
