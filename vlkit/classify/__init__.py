"""Classify folders, files or shards zero-shot: results one image at a time, sorted folders, a report to look at.

from vlkit.classify import classify_images, gather_images
records = gather_images(["photos/"]).records
for result in classify_images(embedder, classifier, records, top=3):
    print(result)
"""

from vlkit.classify.close_calls import SecondLook
from vlkit.classify.report import write_report
from vlkit.classify.run import Classified, Unreadable, classify_images, classify_with_addons, gather_images
from vlkit.classify.sort_into import Sorter

__all__ = [
    "Classified",
    "SecondLook",
    "Sorter",
    "Unreadable",
    "classify_images",
    "classify_with_addons",
    "gather_images",
    "write_report",
]
