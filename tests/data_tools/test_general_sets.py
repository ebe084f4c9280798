from pathlib import Path

from data_tools.general_sets import KINDS, class_captions, drawing_captions, noto_emoji, tiny_imagenet
from vlkit.data.sources import read_source


def test_captions_name_the_class_and_its_kind() -> None:
    assert class_captions("Chihuahua") == (
        "a photo of a Chihuahua.",
        "a Chihuahua",
        "a picture of the Chihuahua.",
        "a photo of a dog.",
        "a Chihuahua, a kind of dog",
    )
    assert len(class_captions("nail")) == 3  # of no kind that is written down
    assert len(class_captions("monarch")) == 7  # an insect and a butterfly


def test_a_drawing_is_called_one() -> None:
    assert drawing_captions("rose|flowers|love") == ("a drawing of a rose.", "rose", "rose, flowers, love")


def test_every_kind_is_of_a_class_that_exists(vlkit_data: Path) -> None:
    folder = vlkit_data / "tiny_imagenet_shards"
    names = {record.captions[0] for record in read_source(folder, format="webdataset").records}
    assert {name for of_kind in KINDS.values() for name in of_kind} <= names
    source = tiny_imagenet(folder)
    assert len(source) == 8000 and all(len(record.captions) >= 3 for record in source)
    emoji = noto_emoji(vlkit_data / "noto_emoji")
    assert len(emoji) == 1903 and all(record.captions[0].startswith("a drawing of a ") for record in emoji)
