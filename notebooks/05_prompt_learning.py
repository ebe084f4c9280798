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
# # Prompt learning: a few labels, a frozen model
#
# A prompt learner leaves the model as it is and trains a handful of vectors: the words around the class names, or
# tokens inside the towers. Here a small model names coloured shapes, drawn offline, on a CPU. Some classes get labels
# (*base*), others none (*new*): what helps the first must not harm the second.

# %% tags=["parameters"] tiny={"num_scenes": 256, "num_steps": 3, "per_class": 6, "shots": 2, "epochs": 1}
num_scenes = 4_000  # pictures to train the model on
num_steps = 240
per_class = 28  # pictures of each class
shots = 16  # of these with a label, in the base classes
epochs = 30
deep_epochs = 2  # of PromptSRC, which runs both towers in each step

# %% [markdown]
# ## 1. A model, and pictures of 48 kinds
# The run behind `vlkit demo`, with a small ViT in place of its ResNet (deep prompts are tokens), stopped early.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from data_tools.build import build_shards
from data_tools.scenes import SEEN, scene_source, write_class_folder
from vlkit.config import load_run
from vlkit.models.tokenizers import CLIP_BPE, get_tokenizer
from vlkit.training.pretrain import pretrain

work = Path("prompts")
tokenizers = {CLIP_BPE: get_tokenizer(CLIP_BPE).encode_ragged}
build_shards(scene_source(num_scenes, seed=0), work / "shards", tokenizers=tokenizers)
vit = "{image_size = 40, patch_size = 8, layers = 3, width = 96, head_width = 32}"
run = load_run(
    "demo",
    [
        f"run.out={work / 'model'}",
        f"run.steps={num_steps}",
        f"data.train={work / 'shards'}",
        f"model.architecture.vision_cfg={vit}",
    ],
)
pretrain(run, resume=True)
write_class_folder(work / "photos", SEEN, per_class, seed=2)

# %% [markdown]
# ## 2. What is learned from, and what is tested
# `labelled_reference` draws the shots by seed and holds some images out for validation; the rest is ours to test on.
# Base are the first 24 kinds, and nothing of the others is shown to any method.

# %%
from vlkit.addons.adapt import labelled_reference
from vlkit.addons.class_names import parse_class
from vlkit.addons.passes import Passes
from vlkit.data.sources import read_source
from vlkit.features.source import open_source

source = open_source(f"run:{work / 'model'}")
passes = Passes(source)
photos = read_source(str(work / "photos"))
names = [parse_class(name.replace("_", " ")) for name in photos.class_names]
half = len(names) // 2
base, new = names[:half], names[half:]
reference, drawn = labelled_reference(
    passes, [one for one in photos.records if one.label < half], base, shots=shots, seed=1
)
tests = {
    "base": (base, drawn.rest),
    "new": (new, [one for one in photos.records if one.label >= half]),
}
print({name: len(records) for name, (_, records) in tests.items()}, "images to test;", drawn.notes)

# %% [markdown]
# ## 3. CoOp and KgCoOp
# CoOp trains the words in front of the names by cross-entropy, KgCoOp holds the class vectors near those of the hand
# template. Both run on image features that were computed once, so a step is one pass of the text tower.

# %%
from vlkit.addons.adapt import adapt
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.registry import make_addon

methods = {"zero-shot": PLAIN}
for spec in (f"coop:words=a picture of a,epochs={epochs},lr=0.02", f"kgcoop:epochs={epochs},lr=0.02"):
    adapted = adapt(make_addon(spec), reference, source)
    methods[adapted.addon.name] = Pipeline([adapted.addon])
    print(adapted.addon.name, adapted.addon.steps, "steps,", adapted.addon.trained, "numbers trained; validation:")
    print("   before", adapted.plain, "after", adapted.adapted)

# %% [markdown]
# ## 4. PromptSRC, a few steps
# Vectors in front of several layers of both towers, held near what the frozen model says. The towers run in every step:
# minutes rather than seconds on real models. `max_seconds` would end it by the clock.

# %%
deep = make_addon(f"prompt_src:epochs={deep_epochs},batch_size=8,lr=0.02,crop=0.7,depth=3,templates=simple")
methods["prompt_src"] = Pipeline([adapt(deep, reference, source).addon])

# %% [markdown]
# ## 5. Base to new, by hand
# Each half is tested among its own classes; the harmonic mean is small where either is.
# `vlkit eval prompts --protocol base-to-new` does this for several data sets, shots and seeds, and can be interrupted.


# %%
def accuracy(pipeline, classes, records):
    images = passes.read(records, pipeline.edits)
    labels = torch.tensor([record.label for record in records])
    first = int(labels.min())
    logits = pipeline.classifier(classes, source).logits(images.vectors)
    return (logits.argmax(1) == labels - first).float().mean().item()


table = {}
for name, pipeline in methods.items():
    table[name] = {part: accuracy(pipeline, classes, records) for part, (classes, records) in tests.items()}
    b, n = table[name]["base"], table[name]["new"]
    print(f"{name:12s} base {b:6.1%}   new {n:6.1%}   harmonic mean {2 * b * n / max(b + n, 1e-9):6.1%}")

figure, axis = plt.subplots(figsize=(6, 3))
for offset, part in enumerate(tests):
    heights = [row[part] for row in table.values()]
    axis.bar([place + 0.4 * offset for place in range(len(table))], heights, width=0.4, label=part)
axis.set_xticks([place + 0.2 for place in range(len(table))], list(table))
axis.set_ylabel("accuracy")
axis.legend()

# %% [markdown]
# ## 6. Save it, use it
# A fitted add-on is a folder: `vlkit classify prompts/photos --model run:prompts/model --classes ... --addon
# prompts/kgcoop` does the same. It remembers the model it was fitted for and refuses any other.

# %%
from vlkit.addons.saved import load_addon, save_addon
from vlkit.classify import classify_with_addons, gather_images

save_addon(methods["kgcoop"].addons[0], work / "kgcoop")
pipeline = Pipeline([load_addon(work / "kgcoop")])
classifier = pipeline.classifier(names, source)
some = gather_images([work / "photos" / photos.class_names[0]]).records[:3]
for result in classify_with_addons(source, pipeline, classifier, some, top=2):
    print(result.record.key, result.classes)

# %% [markdown]
# ## 7. Which method? `auto`
# `vlkit adapt auto` fits LP++, CLAP, Tip-Adapter-F and KgCoOp, compares them on held-out images none of them has seen,
# says why it chose, and saves the winner. LP++, CLAP and Tip-Adapter-F hold for the classes they were fitted with;
# prompts can name others afterwards.

# %%
from vlkit.addons.auto import choose

choice = choose(reference, source)
for row in choice.compared:
    shown = row.reason or f"{row.accuracy:6.1%}"
    print(f"{row.name:14s} {shown}  {row.seconds:5.1f} s   other classes later: {'yes' if row.other_classes else 'no'}")
print(choice.why)
