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
# # First steps: from pictures and captions to a model that names and finds pictures
#
# Everything here runs offline on a CPU, on pictures it draws itself: coloured shapes with captions. The steps are the
# same for your own pictures: read a source, build shards, train, classify, retrieve.

# %% tags=["parameters"] tiny={"num_scenes": 256, "num_steps": 3, "num_gallery": 20, "per_class": 1}
num_scenes = 6_000  # pictures to train on
num_steps = 500
num_gallery = 500  # pictures to search
per_class = 5  # pictures of each class to name

# %% [markdown]
# ## 1. A source
# A source is a list of records: where the image lies, its captions, its label. `read_source` reads folders, tables,
# COCO, Karpathy and Flickr files; here we draw the pictures.

# %%
import io
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from data_tools.scenes import SEEN, scene_source, write_class_folder

source = scene_source(num_scenes, seed=0)
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
for axis, record in zip(axes, source.records, strict=False):
    axis.imshow(Image.open(io.BytesIO(record.image.read())))
    axis.set_title("\n".join(record.captions[:2]), fontsize=7)
    axis.axis("off")

# %% [markdown]
# ## 2. Shards
# Tar files in the webdataset layout, each with an index that holds the offsets and the token ids, so that training
# reads without searching and tokenises nothing twice.

# %%
from data_tools.build import build_shards
from vlkit.models.tokenizers import CLIP_BPE, get_tokenizer

work = Path("first_steps")
report = build_shards(source, work / "shards", tokenizers={CLIP_BPE: get_tokenizer(CLIP_BPE).encode_ragged})
print(report.num_samples, "samples in", report.num_shards, "shards")

# %% [markdown]
# ## 3. Train
# A run is a file of settings. We take the one behind `vlkit demo` and change where it goes and how long it takes.

# %%
from vlkit.config import load_run
from vlkit.training.pretrain import pretrain

run = load_run("demo", [f"run.out={work}", f"run.steps={num_steps}"])
pretrain(run, resume=True)  # continues when this cell was interrupted
plt.figure(figsize=(7, 4))
plt.imshow(plt.imread(work / "loss.png"))
plt.axis("off")

# %% [markdown]
# ## 4. Two verbs
# The run folder is a model: images and texts become vectors, and their inner product says how well they fit.

# %%
import vlkit

embedder = vlkit.load_embedder(f"run:{work}")
write_class_folder(work / "photos", SEEN, per_class, seed=1)
paths = sorted((work / "photos").rglob("*.jpg"))
images = embedder.embed_images(paths[:4])
texts = embedder.embed_texts(["a blue circle", "a red star"])
print((images @ texts.T).round(decimals=2))

# %% [markdown]
# ## 5. Classify a folder
# The same as `vlkit classify first_steps/photos --model run:first_steps --classes ...`.

# %%
from vlkit.classify import classify_images, gather_images

classifier = vlkit.ZeroShotClassifier.build(embedder, [kind.name for kind in SEEN], "a picture of a {}")
results = list(classify_images(embedder, classifier, gather_images([work / "photos"]).records, top=2))
right = sum(result.classes[0][0] == Path(result.record.key).parent.name.replace("_", " ") for result in results)
print(f"{right} of {len(results)} right; the first: {results[0].classes}")

# %% [markdown]
# ## 6. Retrieve, and measure it
# Each caption looks for its picture and each picture for its caption, among all of them.

# %%
from eval.retrieval import RetrievalEvaluator

gallery = scene_source(num_gallery, seed=99, distinct=True)
evaluation = RetrievalEvaluator(gallery.records).run(embedder)
for key, value in evaluation.metrics.items():
    print(f"{key:28s} {value:8.3f}   95% interval {evaluation.intervals.get(key)}")
