"""Errors and the hint that names the nearest valid name."""

import pytest

from vlkit import errors
from vlkit.errors import VlkitError, did_you_mean


@pytest.mark.parametrize("name", ["ConfigError", "ModelError", "DataError", "CheckpointError", "GalleryError"])
def test_all_errors_are_vlkit_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), VlkitError)


def test_the_nearest_name_is_given_whatever_its_case() -> None:
    assert did_you_mean("vit-b-23", ["ViT-B-32", "RN50", "coca_base"]) == "Did you mean ViT-B-32?"


def test_several_near_names() -> None:
    assert did_you_mean("train", ["trains", "trail", "unlike"]) == "Did you mean trains or trail?"


def test_at_most_limit_names() -> None:
    assert did_you_mean("aaaa", ["aaab", "aaac", "aaad"], limit=1).count("aaa") == 1


def test_few_names_are_listed_when_none_is_near() -> None:
    assert did_you_mean("zzz", ["folder", "table"]) == "Valid: folder, table."


def test_many_names_are_counted_when_none_is_near() -> None:
    assert did_you_mean("zzz", (f"model{i}" for i in range(21))) == "Nothing similar among the 21 valid names."


def test_nothing_to_choose_from() -> None:
    assert did_you_mean("zzz", []) == ""
