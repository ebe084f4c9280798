# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Data: build, look, validate, dedupe, load
#
# From files as they lie on a disk to batches for training. The pictures are drawn here, so it runs offline; every step
# is the same for your own, and each is also a command: `vlkit shards build`, `summarize`, `validate`, `dedupe`.

# %% tags=["parameters"] tiny={"num_pictures": 60, "num_copies": 3, "batch_size": 16}
num_pictures = 2_000
num_copies = 40  # the same pictures once more, stored at a lower quality
batch_size = 64

# %% [markdown]
# ## 1. Files, as people have them
# A folder of JPEGs and a table with their captions; some pictures came in twice, and one was cut off while it was
# copied.

# %%
import csv
import io
from pathlib import Path

from PIL import Image

from data_tools.scenes import scene_source

work = Path("data_notebook")
(work / "images").mkdir(parents=True, exist_ok=True)
records = scene_source(num_pictures, seed=0).records
with (work / "captions.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["image", "caption"])
    for number, record in enumerate(records):
        encoded = record.image.read()
        (work / "images" / f"{number:05}.jpg").write_bytes(encoded[:500] if number == 7 else encoded)
        table.writerow([f"{number:05}.jpg", record.captions[0]])
    for number in range(10, 10 + num_copies):
        picture = Image.open(io.BytesIO(records[number].image.read()))
        picture.save(work / "images" / f"again-{number:05}.jpg", quality=60)
        table.writerow([f"again-{number:05}.jpg", "seen before"])

# %% [markdown]
# ## 2. Build
# `read_source` finds out what lies there. `build_shards` writes tar files of the webdataset kind, each with an index of
# offsets and token ids; what cannot be used is left out, counted and listed. Run again, it continues where it stopped.

# %%
from data_tools.build import build_shards
from vlkit.data.sources import read_source
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

tokenizer = TextTokenizer(CLIP_BPE, context_length=32)
source = read_source(work / "captions.csv", images=work / "images")
print(source.format, "with", len(source), "records")
report = build_shards(
    source, work / "shards", samples_per_shard=500, shuffle=True, tokenizers={CLIP_BPE: tokenizer.encode_ragged}
)
print(report.num_samples, "samples in", report.num_shards, "shards; left out:", *report.failures.lines())

# %% [markdown]
# ## 3. Look
# Counts, sizes and histograms as text and as a page with a contact sheet.

# %%
from data_tools.summarize import summarize_shards, write_html

summary = summarize_shards(work / "shards")
print(summary.to_text())
write_html(summary, work / "summary.html")

# %% [markdown]
# ## 4. Validate
# Every tar opens, every picture decodes, every index fits. Here a tar is cut short as a broken copy would be: the
# samples behind the cut are named, the others stay usable.

# %%
from data_tools.validate import validate_shards

print(*validate_shards(work / "shards").lines(), sep="\n")
(work / "broken").mkdir(exist_ok=True)
whole = (work / "shards" / "00000.tar").read_bytes()
(work / "broken" / "00000.tar").write_bytes(whole[: len(whole) // 2])
print(*validate_shards(work / "broken").lines(), sep="\n")

# %% [markdown]
# ## 5. Dedupe
# Same bytes, same pixels, near copies (perceptual hash, confirmed on the pixels). The kept ones go into new shards.

# %%
from data_tools.copy_samples import copy_samples
from data_tools.dedupe import dedupe_shards

found = dedupe_shards(work / "shards")
for name, count in found.rows():
    print(f"{name:30s} {count:6d}")
kept = copy_samples(found.shards, found.keep, work / "clean", samples_per_shard=500)
print("kept", kept.num_samples)

# %% [markdown]
# ## 6. Load
# Batches are a function of shards, settings and seed: any number of workers gives the same ones, and a run that was
# stopped goes on with the batch it would have had. `workers=2` decodes in two processes (a script then needs
# `if __name__ == "__main__":`).

# %%
import matplotlib.pyplot as plt
import torch

from vlkit.data.augment import Augment
from vlkit.data.loader import Loader
from vlkit.data.rand_augment import RandAugment
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Preprocess

with Loader(
    ShardSet.open(work / "clean"),
    tokenizer,
    batch_size=batch_size,
    preprocess=Preprocess(size=64),
    augment=Augment(crop_scale=(0.5, 1.0), rand_augment=RandAugment(num_ops=1)),
    second_view=Augment(crop_scale=(0.2, 1.0), hflip=0.5),
) as loader:
    first, *rest = loader.epoch(0)
    print(1 + len(rest), "batches;", tuple(first.images.shape), first.images.dtype, tuple(first.tokens.shape))
    resumed = next(loader.epoch(0, start=1))
    print("the same after a restart:", torch.equal(resumed.images, rest[0].images))

figure, axes = plt.subplots(2, 6, figsize=(12, 4.2))
for column in range(6):
    for axis, images in zip(axes[:, column], (first.images, first.extra["second_view"]), strict=True):
        axis.imshow(images[column].permute(1, 2, 0))
        axis.axis("off")
    axes[0, column].set_title(first.keys[column], fontsize=7)
