"""Samples that know their number, and what is done to shards of them.

Each image carries its number as a 4 x 4 pattern of black and white cells, each caption the same number with a check
sum, so a pair that does not belong together shows itself, and damage cannot turn one number into another. The keys are
the same in all shards, which is what tempts a reader to pair across them.

Fixtures:
    numbered    `NumberedSamples`: the samples, and the number that pixels and texts tell.
    damage      `damage(case, folder)`: writes the shards of a case with one to three damages; says which.
    harms       names of all damages.
"""

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

SHARDS, ROWS, CELL = 3, 6, 16
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


# --- what is damaged: samples that know their number ---


def codes() -> np.ndarray:
    """(18, 16) bits; any two differ in at least five."""
    random, chosen = np.random.default_rng(5), []
    while len(chosen) < SHARDS * ROWS:
        bits = random.integers(0, 2, 16)
        if all((bits != other).sum() >= 5 for other in chosen):
            chosen.append(bits)
    return np.array(chosen)


CODES = codes()


def picture(number: int) -> bytes:
    cells = CODES[number].reshape(4, 4).repeat(CELL, 0).repeat(CELL, 1).astype(np.uint8) * 255
    buffer = io.BytesIO()
    kind, options = (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"quality": 95}))[number % 3]
    Image.fromarray(np.stack([cells] * 3, -1)).save(buffer, kind, **options)
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"number {number} {hashlib.sha256(str(number).encode()).hexdigest()[:16]}"


PICTURES = [picture(number) for number in range(SHARDS * ROWS)]


def number_in_pixels(pixels: torch.Tensor) -> int | None:
    """The number that an image (3, 64, 64) shows, if it clearly shows one."""
    if pixels.shape != (3, 4 * CELL, 4 * CELL):
        return None
    cells = pixels.float().mean(0).unflatten(0, (4, CELL)).unflatten(2, (4, CELL))[:, 4:-4, :, 4:-4].mean((1, 3))
    if ((cells > 40) & (cells < 215)).any():
        return None
    found = np.flatnonzero(((cells.flatten() > 128).numpy() == CODES).all(1))
    return int(found[0]) if len(found) else None


def number_in_text(text: str) -> int | None:
    words = text.split()
    if len(words) == 3 and words[1].isascii() and words[1].isdigit() and len(words[1]) < 4:
        return int(words[1]) if caption(int(words[1])) == text else None
    return None


class Member(NamedTuple):
    name: str
    content: bytes
    header: Callable[[bytes], bytes] = lambda header: header  # what is done to the 512 bytes of the header


def members_of(shard: int) -> list[Member]:
    members = []
    for row in range(ROWS):
        number = shard * ROWS + row
        suffix = ("jpg", "png", "webp")[number % 3]
        members.append(Member(f"{row:04d}.{suffix}", PICTURES[number]))
        if number % 4 == 3:
            members.append(Member(f"{row:04d}.json", json.dumps({"caption": caption(number)}).encode()))
        else:
            members.append(Member(f"{row:04d}.txt", caption(number).encode()))
        if number % 5 == 0:
            members.append(Member(f"{row:04d}.cls", str(number).encode()))
    return members


def tar_bytes(members: list[Member], kind: int) -> bytes:
    buffer = io.BytesIO()
    for member in members:
        info = tarfile.TarInfo(member.name)
        info.size = len(member.content)
        header = info.tobuf(kind)
        buffer.write(header[:-512] + member.header(header[-512:]))
        buffer.write(member.content + bytes(-len(member.content) % 512))
    return buffer.getvalue() + bytes(1024)


def with_sum(header: bytes) -> bytes:
    """A header whose sum is right again."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


# --- damages to the files of a shard ---


def some(random: np.random.Generator, members: list[Member], images: bool = False) -> int:
    places = [i for i, member in enumerate(members) if not images or member.name.endswith(("jpg", "png", "webp"))]
    return int(random.choice(places)) if places else -1


def replaced(members: list[Member], place: int, content: bytes) -> list[Member]:
    return [member._replace(content=content) if i == place else member for i, member in enumerate(members)]


def flip_bits(random: np.random.Generator, content: bytes, most: int = 20) -> bytes:
    flipped = bytearray(content)
    for _ in range(int(random.integers(1, most + 1))):
        flipped[int(random.integers(len(flipped)))] ^= 1 << int(random.integers(8))
    return bytes(flipped)


def image_with_flips(random, members):
    place = some(random, members, images=True)
    return replaced(members, place, flip_bits(random, members[place].content))


def image_cut(random, members):
    place = some(random, members, images=True)
    return replaced(members, place, members[place].content[: int(random.integers(len(members[place].content)))])


def image_bomb(random, members):
    place = some(random, members, images=True)
    return replaced(members, place, BOMBS[int(random.integers(len(BOMBS)))])


def text_of_nonsense(random, members):
    texts = [b"", b"\0" * 99, b"\xff\xfe\xfa", b" \n \n", "\u202e\x1b[31m".encode(), b"x" * 300_000, b"\n" * 50_000]
    place = next((i for i, member in enumerate(members) if member.name.endswith("txt")), some(random, members))
    return replaced(members, place, texts[int(random.integers(len(texts)))])


def json_of_nonsense(random, members):
    values = [b"[" * 100_000, b"{" * 99, b'{"caption": 3}', b'{"captions": [1, null]}', b"1" * 9999, b"\xff", b"null"]
    place = some(random, members)
    name = f"{members[place].name.partition('.')[0]}.json"
    there = [i for i, member in enumerate(members) if member.name == name]
    content = values[int(random.integers(len(values)))]
    if there:
        return replaced(members, there[0], content)
    return [*members[: place + 1], Member(name, content), *members[place + 1 :]]


def label_of_nonsense(random, members):
    values = [b"9" * 12, b"9" * 4000, b"9" * 5000, b"-3", b"", b"1e9", b"\xff"]
    place = next((i for i, member in enumerate(members) if member.name.endswith("cls")), None)
    return members if place is None else replaced(members, place, values[int(random.integers(len(values)))])


def swap_neighbours(random, members):
    place = int(random.integers(len(members) - 1))
    return [*members[:place], members[place + 1], members[place], *members[place + 2 :]]


def swap_any(random, members):
    first, second = random.choice(len(members), 2, replace=False)
    swapped = list(members)
    swapped[first], swapped[second] = members[second], members[first]
    return swapped


def shuffle_all(random, members):
    return [members[i] for i in random.permutation(len(members))]


def drop(random, members):
    place = some(random, members)
    return [member for i, member in enumerate(members) if i != place]


def repeat(random, members):
    place, to = some(random, members), int(random.integers(len(members)))
    return [*members[:to], members[place], *members[to:]]


def huge_size(random, members):
    """A header that claims up to 2 ** 87 bytes, with a right sum."""
    place, bits = some(random, members), int(random.integers(33, 88))
    stated = b"\x80" + (1 << bits).to_bytes(11, "big")
    changed = members[place]._replace(header=lambda header: with_sum(header[:124] + stated + header[136:]))
    return [changed if i == place else member for i, member in enumerate(members)]


def huge_record(random, members):
    """A pax or GNU record of 2 MiB, or with lengths that do not add up, before a file."""
    place, kind = some(random, members), bytes([int(random.choice(list(b"xgLK")))])
    contents = (
        b"9999999 path=" + b"a" * 2_000_000,
        b"30 path=x\n",
        b"-1 size=5\n",
        b"14 size=\xff\xff\xff\xff\n",
        b"a" * 99,
    )
    content = contents[int(random.integers(len(contents)))]
    record = Member("././@Record", content, lambda header: with_sum(header[:156] + kind + header[157:]))
    return [*members[:place], record, *members[place:]]


def odd_kind(random, members):
    """A link, a device, a folder, a sparse file or an unknown kind in place of a file."""
    place, kind = some(random, members), bytes([int(random.choice(list(b"123456SDMNVz\xff")))])
    changed = members[place]._replace(header=lambda header: with_sum(header[:156] + kind + header[157:]))
    return [changed if i == place else member for i, member in enumerate(members)]


# --- damages to the bytes of a tar ---


def flips_anywhere(random, data):
    return flip_bits(random, data)


def flips_in_a_header(random, data):
    place = 512 * int(random.integers(max(len(data) // 512, 1)))
    return data[:place] + flip_bits(random, data[place : place + 512], 4) + data[place + 512 :]


def cut_off(random, data):
    return data[: int(random.integers(len(data)))]


def cut_out(random, data):
    """A piece is missing in the middle, and what follows is no longer aligned."""
    start, length = int(random.integers(len(data))), int(random.integers(1, 5000))
    return data[:start] + data[start + length + (length % 512 == 0) :]


def nonsense_within(random, data):
    start = int(random.integers(len(data)))
    noise = random.bytes(int(random.integers(1, 3000))) if random.random() < 0.5 else bytes(2000)
    return (data[:start] + noise + data[start + len(noise) :])[: len(data)]


def nonsense_behind(random, data):
    return data + random.bytes(int(random.integers(1, 5000)))


def two_in_one(random, data):
    return data + data


def nothing(random, data):
    return b""


def compressed(random, data):
    return gzip.compress(data)


IN_FILES = (
    image_with_flips, image_with_flips, image_cut, image_cut, image_bomb, text_of_nonsense, json_of_nonsense,
    label_of_nonsense, swap_neighbours, swap_any, shuffle_all, drop, repeat, huge_size, huge_record, odd_kind,
)  # fmt: skip
IN_BYTES = (
    flips_anywhere, flips_anywhere, flips_in_a_header, flips_in_a_header, cut_off, cut_off, cut_out, nonsense_within,
    nonsense_behind, two_in_one, nothing, compressed,
)  # fmt: skip


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(PICTURES[0])
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = (
    png(30_000, 30_000, (b"IDAT", zlib.compress(bytes(2_000_000)))),
    png(64, 64, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000))), (b"IDAT", zlib.compress(bytes(64 * 65)))),
    png(64, 64, (b"IDAT", zlib.compress(bytes(50_000_000)))),
    png(64, 64, (b"iCCP", b"p\0\0" + zlib.compress(bytes(80_000_000))), (b"IDAT", zlib.compress(bytes(64 * 65)))),
    png(2**31 - 1, 2**31 - 1, (b"IDAT", b"")),
    jpeg_of_size(65_500, 65_500),
    b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\xf7\0\0" + bytes(768) + b",",
    gzip.compress(bytes(10_000_000)),
    b"II*\0" + struct.pack("<I", 2**31),
    b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(20),
)  # fmt: skip


# --- a case ---


class Outcome(NamedTuple):
    touched: set[int]
    damages: list[str]
    only_images: bool


def damage(case: int, folder: Path) -> Outcome:
    """Write the shards of a case with one to three damages."""
    random = np.random.default_rng([17, case])
    files, kinds = [members_of(shard) for shard in range(SHARDS)], random.integers(0, 3, SHARDS)
    planned = [(int(random.integers(SHARDS)), bool(random.random() < 0.55)) for _ in range(int(random.integers(1, 4)))]
    outcome = Outcome({shard for shard, _ in planned}, [], all(in_files for _, in_files in planned))
    only_images = outcome.only_images
    for shard in (shard for shard, in_files in planned if in_files):
        harm = IN_FILES[int(random.integers(len(IN_FILES)))]
        files[shard] = harm(random, files[shard])
        outcome.damages.append(f"{shard}: {harm.__name__}")
        only_images &= harm in (image_with_flips, image_cut, image_bomb)
    data = [tar_bytes(members, FORMATS[kind]) for members, kind in zip(files, kinds, strict=True)]
    for shard in (shard for shard, in_files in planned if not in_files):
        harm = IN_BYTES[int(random.integers(len(IN_BYTES)))]
        data[shard] = harm(random, data[shard]) if data[shard] else b""
        outcome.damages.append(f"{shard}: {harm.__name__}")
    folder.mkdir()
    for shard, content in enumerate(data):
        (folder / f"{shard:05d}.tar").write_bytes(content)
    return outcome._replace(only_images=only_images)


class NumberedSamples:
    """What a test asks about the samples."""

    shards, rows, samples = SHARDS, ROWS, SHARDS * ROWS
    side = 4 * CELL  # pixels of an image
    pictures = PICTURES
    caption = staticmethod(caption)
    in_pixels = staticmethod(number_in_pixels)
    in_text = staticmethod(number_in_text)

    @staticmethod
    def check_pair(pixels: torch.Tensor, text: str, shard: int) -> bool:
        """Whether both are whole; fails when they are of different samples."""
        shown, said = number_in_pixels(pixels), number_in_text(text)
        if shown is not None and said is not None:
            assert shown == said, f"the image of {shown} with the caption of {said}"
            assert shown // ROWS == shard, f"sample {shown} in shard {shard}"
        return shown is not None and said is not None


@pytest.fixture
def numbered() -> NumberedSamples:
    return NumberedSamples()


@pytest.fixture(name="damage")
def _damage() -> Callable[[int, Path], Outcome]:
    return damage


@pytest.fixture
def harms() -> set[str]:
    return {harm.__name__ for harm in (*IN_FILES, *IN_BYTES)}
