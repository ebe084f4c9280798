"""What is in a set of shards: counts, sizes, captions, duplicates, labels, and a few of the images.

    summary = summarize_shards("shards/", workers=2)
    print(summary.to_text());  write_html(summary, "summary.html")

Image headers are parsed and image bytes are hashed; pixels are decoded for the contact sheet only.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.chunks import cut_chunks, map_chunks
from data_tools.histogram import Histogram, histogram
from data_tools.page import write_page
from data_tools.sample_facts import Facts, facts_of, thumbnail_of
from vlkit.contracts import Progress
from vlkit.data.records import Problems
from vlkit.data.shard_index import ShardSet, ShardSpec
from vlkit.data.sources.webdataset import class_names_beside
from vlkit.errors import DataError
from vlkit.escape import one_line

_NUM_THUMBNAILS = 72
_THUMBNAIL_SIDE = 128  # pixels: some 5 KB each
_MAX_PAGE = 2_000_000  # bytes of thumbnails on the page
_MAX_LABELS = 1000  # classes on the page
_MAX_SHOWN = 10  # repeated captions and images, and captions under a thumbnail
_SIDES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_ASPECTS = (0.0, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2.0, 3.0)
_WORDS = (0, 1, 2, 4, 6, 8, 10, 12, 15, 20, 30, 50, 100)
_CAPTIONS = (0, 1, 2, 3, 4, 5, 6, 10, 20)


class Thumbnail(NamedTuple):
    """One sample of the contact sheet."""

    key: str  # shard/key
    url: str | None  # JPEG data URL; None where the image does not decode
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Repeated:
    """Something that occurs more than once."""

    what: str  # the caption, or `shard/key` of the first image
    count: int


@dataclass(frozen=True)
class Summary:
    """The content of a set of shards. Sizes in bytes and pixels; aspect is width / height as stored after EXIF."""

    num_shards: int
    num_samples: int
    num_problems: int  # found by the index or while reading; see `problems`
    num_captions: int
    num_words: int
    tar_bytes: int
    image_bytes: int
    num_unreadable: int  # images whose header cannot be parsed
    samples_per_shard: tuple[int, float, int]  # smallest, mean, largest
    formats: dict[str, int]  # "JPEG RGB" -> images
    shorter_side: Histogram
    aspect: Histogram
    captions_per_image: Histogram
    words_per_caption: Histogram
    num_duplicate_images: int  # images whose bytes an earlier image has
    num_duplicate_captions: int  # captions that stand earlier, letter by letter
    repeated_images: tuple[Repeated, ...]
    repeated_captions: tuple[Repeated, ...]
    labels: dict[str, int]  # class name, or number where names are not known -> samples
    problems: tuple[str, ...]  # one line a cause
    thumbnails: tuple[Thumbnail, ...]  # evenly spaced samples

    def to_json(self) -> dict[str, Any]:
        """Everything but the thumbnails."""
        values = asdict(self)
        del values["thumbnails"]
        return values

    def rows(self) -> list[tuple[str, str]]:
        """The figures as (name, value), made safe for a terminal."""
        smallest, mean, largest = self.samples_per_shard
        formats = ", ".join(f"{name} {count:,}" for name, count in self.formats.items())
        rows = [
            ("shards", f"{self.num_shards:,} ({_bytes(self.tar_bytes)})"),
            ("samples", f"{self.num_samples:,} ({smallest:,} to {largest:,} a shard, mean {mean:,.0f})"),
            ("problems", f"{self.num_problems:,}"),
            ("images", f"{_bytes(self.image_bytes)}, mean {_bytes(self.image_bytes / max(self.num_samples, 1))}"),
            ("formats", formats),
            ("unreadable headers", f"{self.num_unreadable:,}"),
            ("captions", f"{self.num_captions:,} ({self.num_captions / max(self.num_samples, 1):.2f} an image)"),
            ("words", f"{self.num_words:,} ({self.num_words / max(self.num_captions, 1):.1f} a caption)"),
            ("duplicate images", f"{self.num_duplicate_images:,}"),
            ("duplicate captions", f"{self.num_duplicate_captions:,}"),
            ("classes", f"{len(self.labels):,}"),
        ]
        return [(name, one_line(value)) for name, value in rows]

    def histograms(self) -> dict[str, Histogram]:
        """The histograms under the titles they are shown with."""
        return {
            "shorter side, pixels": self.shorter_side,
            "width / height": self.aspect,
            "captions per image": self.captions_per_image,
            "words per caption": self.words_per_caption,
        }

    def to_text(self) -> str:
        """The whole summary for a terminal."""
        width = max(len(name) for name, _ in self.rows())
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows()]
        for title, counts in self.histograms().items():
            lines += ["", title, *counts.to_lines()]
        for title, repeated in (
            ("repeated images", self.repeated_images),
            ("repeated captions", self.repeated_captions),
        ):
            if repeated:
                lines += ["", title, *(f"{found.count:>8,} x {one_line(found.what, 100)}" for found in repeated)]
        if self.problems:
            lines += ["", "problems", *(one_line(line) for line in self.problems)]
        return "\n".join(lines)


def summarize_shards(spec: ShardSpec, *, progress: Progress | None = None, workers: int = 0) -> Summary:
    """Read all samples of a set of shards once.

    Args:
        spec: what `expand_shards` takes.
        progress: called with (samples done, all samples).
        workers: processes that read; 0 reads in this one.

    Raises:
        DataError: no shards, no usable sample, or a worker died.
    """
    shards = ShardSet.open(spec)
    chunks = cut_chunks((shard.path, shard.num_samples) for shard in shards.shards)
    facts = Facts.join(list(map_chunks(facts_of, chunks, workers, progress)))
    problems = Problems()
    for cause, where in facts.problems:
        problems.add(cause, where)
    sizes = [shard.num_samples for shard in shards.shards]
    readable = facts.widths > 0
    shorter = np.minimum(facts.widths, facts.heights)[readable]
    return Summary(
        num_shards=len(sizes),
        num_samples=shards.num_samples,
        num_problems=sum(shard.problems.total for shard in shards.shards) + problems.total,
        num_captions=len(facts.caption_hashes),
        num_words=int(facts.words.sum()),
        tar_bytes=sum(shard.path.stat().st_size for shard in shards.shards),
        image_bytes=int(facts.image_bytes.sum()),
        num_unreadable=int((~readable).sum()),
        samples_per_shard=(min(sizes), shards.num_samples / len(sizes), max(sizes)),
        formats=dict(facts.formats.most_common()),
        shorter_side=histogram(shorter, _SIDES),
        aspect=histogram(facts.widths[readable] / facts.heights[readable], _ASPECTS),
        captions_per_image=histogram(facts.num_captions, _CAPTIONS),
        words_per_caption=histogram(facts.words, _WORDS),
        num_duplicate_images=_num_duplicates(facts.image_hashes),
        num_duplicate_captions=_num_duplicates(facts.caption_hashes),
        repeated_images=_repeated_images(shards, facts.image_hashes),
        repeated_captions=_repeated_captions(shards, facts),
        labels=_named_labels(shards, facts, problems),
        problems=tuple(_index_lines(shards) + problems.lines()),
        thumbnails=_thumbnails(shards),
    )


def write_html(summary: Summary, path: str | Path) -> None:
    """Write the summary as one page that needs no other file; all text out of data is escaped.

    Raises:
        DataError: the page cannot be written.
    """
    most = max(summary.labels.values(), default=1)
    write_page(
        path,
        "summary.html.j2",
        rows=summary.rows(),
        histograms=[(title, counts.ranges(), counts.line()) for title, counts in summary.histograms().items()],
        repeated=[("Repeated images", summary.repeated_images), ("Repeated captions", summary.repeated_captions)],
        labels=[(label, count, count / most) for label, count in list(summary.labels.items())[:_MAX_LABELS]],
        num_labels=len(summary.labels),
        problems=summary.problems,
        thumbnails=summary.thumbnails,
        num_samples=summary.num_samples,
    )


def _num_duplicates(hashes: NDArray[np.uint64]) -> int:
    return len(hashes) - len(np.unique(hashes))


def _most_repeated(hashes: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """(first position, count) of the values that occur most often, at least twice."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    for place in np.lexsort((first, -counts))[:_MAX_SHOWN]:
        if counts[place] > 1:
            yield int(first[place]), int(counts[place])


def _repeated_images(shards: ShardSet, hashes: NDArray[np.uint64]) -> tuple[Repeated, ...]:
    return tuple(Repeated(shards.key(position), count) for position, count in _most_repeated(hashes))


def _repeated_captions(shards: ShardSet, facts: Facts) -> tuple[Repeated, ...]:
    ends = np.cumsum(facts.num_captions)
    found = []
    for position, count in _most_repeated(facts.caption_hashes):
        sample = int(np.searchsorted(ends, position, side="right"))
        shard, row = shards.locate(sample)
        place = position - int(ends[sample] - facts.num_captions[sample])
        found.append(Repeated(shard.captions(row)[place], count))
    return tuple(found)


def _thumbnails(shards: ShardSet) -> tuple[Thumbnail, ...]:
    """Evenly spaced samples, as many as fit the page."""
    number = min(_NUM_THUMBNAILS, shards.num_samples)
    left, found = _MAX_PAGE, []
    for sample in np.linspace(0, shards.num_samples - 1, number).round().astype(int).tolist():
        shard, row = shards.locate(sample)
        url = thumbnail_of(shard.image_bytes(row), shards.key(sample), _THUMBNAIL_SIDE)
        left -= len(url or "")
        if left < 0:
            break
        try:
            captions = shard.captions(row)[:_MAX_SHOWN]
        except DataError:
            captions = ()  # counted among the problems
        found.append(Thumbnail(shards.key(sample), url, captions))
    return tuple(found)


def _named_labels(shards: ShardSet, facts: Facts, problems: Problems) -> dict[str, int]:
    try:
        names = class_names_beside(shards.shards[0].path.parent, [*facts.labels])
    except DataError as error:
        problems.add("class names that do not fit the labels", str(error))
        names = ()
    return {names[label] if 0 <= label < len(names) else str(label): n for label, n in sorted(facts.labels.items())}


def _index_lines(shards: ShardSet) -> list[str]:
    return [f"{name}: {line}" for name, problems in shards.problems.items() for line in problems.lines()]


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
