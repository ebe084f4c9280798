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
# # Add-ons: what a frozen encoder can be made to do without training it
#
# Corrections of a gallery, few-shot heads, patches that answer texts, what attention heads look for. Everything here
# runs offline on a CPU, on the small encoder of this repository (`tests/data/encoder`) and on pictures it draws itself;
# `folder` takes photographs of yours instead. `vlkit methods` lists all methods, `--addon NAME` puts one into
# `classify`, `eval` and `retrieve`, and the README says what each changed on real data.

# %% tags=["parameters"] tiny={"per_class": 10, "num_kinds": 4, "shots": 2, "bank": 8, "num_pictures": 8}
folder = ""  # class folders of your own; empty: coloured shapes are drawn
model = ""  # open_clip:ViT-B-32/openai, run:FOLDER, ...; empty: the encoder of this repository
per_class = 30  # pictures of each class that is drawn
num_kinds = 12  # classes that are drawn
shots = 4  # labelled pictures of each class to learn from
bank = 40  # pictures without labels that DN takes its mean from
num_pictures = 100  # pictures that heads are described on

# %% [markdown]
# ## 1. Plain against add-ons
# Some pictures of each class are learned from, some validated on, the rest is tested on. `Passes` encodes each picture
# once for all methods, and once more in ten views for those that ask for them. DN and NNN (`top_k_mean`) see pictures
# without labels; Tip-Adapter-F, LP++ and CLAP see the few labels. Differences to plain come with paired 95% intervals.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import vlkit
from data_tools.scenes import SEEN, write_class_folder
from eval.addons import classification_bench, compare_addons
from vlkit.addons.passes import Passes
from vlkit.addons.registry import make_addon
from vlkit.data.sources import read_source
from vlkit.features.source import open_source

torch.manual_seed(0)
if not folder:
    folder = "addons/pictures"
    write_class_folder(Path(folder), SEEN[:num_kinds], per_class, seed=0)
encoder_folder = Path(vlkit.__file__).parents[1] / "tests" / "data" / "encoder"
source = open_source(model or f"local-dir:{encoder_folder}", "cpu")
pictures = read_source(folder)
names = [name.replace("_", " ") for name in pictures.class_names]
passes = Passes(source, local=True)
bench, drawn = classification_bench(passes, pictures.records, names, shots=shots)
methods = [f"distribution_norm:bank_size={bank}", "top_k_mean:k=8", "tip_adapter_f", "lp_plus_plus", "clap", "calip"]
board = compare_addons(bench, source, passes, [make_addon(name) for name in methods])
print(f"{len(bench.test)} pictures to test on; the tower saw them in {board.num_passes} kinds of passes")
for row in board.rows:
    change = row.differences.get("accuracy@1")
    against = f"{change.difference:+.1%} ({change.low:+.1%} to {change.high:+.1%})" if change else ""
    print(f"{row.name:<20} {row.metrics['accuracy@1']:.1%}  {against}")
for name, reason in board.left_out.items():
    print(f"{name} is left out: {reason}")

# %% [markdown]
# ## 2. Fit one, keep it
# A fitted add-on is a folder of safetensors and JSON. It knows its encoder, its classes and what it saw, and refuses
# others. `vlkit adapt tip_adapter_f --model ... --data ... --out addons/tip` does the same.

# %%
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.saved import load_addon, save_addon

pipeline = Pipeline([make_addon("tip_adapter_f")]).fit(bench.reference, source)
place = save_addon(pipeline.addons[0], Path("addons/tip"))
again = Pipeline([load_addon(place)])
print(again.describe())

# %% [markdown]
# ## 3. Patches that answer texts
# Two pictures side by side, gone through window by window. The last block of a ViT mixes what its patches say; MaskCLIP
# takes its values as they are, ClearCLIP lets queries attend to queries and drops the residual path. After the `with`
# the model is what it was, to the bit.

# %%
from PIL import Image

from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.addons.passes import editing
from vlkit.addons.patch_scores import patch_scores, segmented, window_of, window_scores
from vlkit.addons.towers.clearclip import ClearClip
from vlkit.addons.towers.maskclip import MaskClip
from vlkit.data.images import read_image
from vlkit.interpret.pictures import overlay
from vlkit.interpret.regions import overlay_regions
from vlkit.models.embedder import Embedder

embedder: Embedder = source.embedder
encoder = embedder.encoder
size = encoder.image_size
chosen = (bench.test[0], bench.test[-1])  # of the first and of the last class
halves = [encoder.preprocess(read_image(record)) for record in chosen]
pair = torch.cat(halves, dim=2)  # (3,S,2S)
pair_names = [names[record.label or 0] for record in chosen]
texts = template_weights(source, [(name,) for name in pair_names], load_templates("simple"))
photo = Image.fromarray(pair.permute(1, 2, 0).numpy())
with torch.no_grad():
    stock = encoder.encode_patches(halves[0][None])
figure, axes = plt.subplots(2, 3, figsize=(12, 5))
for row, (title, edits) in zip(axes, (("maskclip", [MaskClip()]), ("clearclip", [ClearClip()])), strict=True):
    with editing(encoder, edits):
        maps = window_scores(
            lambda squares: patch_scores(encoder.encode_patches(squares), texts), pair, window_of(encoder)
        )
    for axis, name, one in zip(row, pair_names, maps, strict=False):
        axis.imshow(overlay(photo, one))
        axis.set_title(f"{title}: {name}")
    row[2].imshow(overlay_regions(photo, segmented(40 * maps)))
    row[2].set_title(f"{title}: the better of both")
for axis in axes.flat:
    axis.set_axis_off()
with torch.no_grad():
    assert torch.equal(encoder.encode_patches(halves[0][None]), stock)

# %% [markdown]
# ## 4. Where a feature comes from
# The image feature is a sum of what every head of every layer and every MLP writes: exactly, not approximately.
# TextSpan names what a head's part varies along. The share is that of the variance within the span of its texts.

# %%
from vlkit.interpret.decomposition import decompose
from vlkit.interpret.text_span import text_span

some = pictures.records[:: max(1, len(pictures.records) // num_pictures)]
images = torch.stack([encoder.preprocess(read_image(record)) for record in some])
parts = decompose(encoder, images)
with torch.no_grad():
    print("largest difference from the feature:", (parts.total() - encoder.encode_image(images)).abs().max().item())
pool = ["red", "green", "blue", "yellow", "a circle", "a star", "a square", "a triangle", "stripes", "dots", "grey"]
features = source.embed_texts([f"a photo of {text}" for text in pool])
for head in range(parts.heads.shape[2]):
    span = text_span(parts.with_shared_biases().heads[:, -1, head], features, num_texts=3)
    print(f"last layer, head {head}: {', '.join(pool[row] for row in span.texts)} ({span.explained[-1]:.0%})")

# %% [markdown]
# ## 5. Without a head
# A head that follows what must not count can write the same into every feature: `head_ablation` puts its mean there.

# %%
from vlkit.addons.pipeline import PLAIN
from vlkit.addons.towers.head_ablation import HeadAblation

last = parts.heads.shape[1] - 1
ablated = Pipeline([HeadAblation(heads=f"{last}.0")]).fit(bench.reference, source)
labels = torch.tensor([record.label for record in bench.test])
for title, one in (("plain", PLAIN), (f"without head 0 of layer {last}", ablated)):
    vectors = passes.read(bench.test, one.edits).vectors
    predicted = one.classifier(bench.reference.class_names, source).logits(vectors).argmax(1)
    print(f"{title}: {(predicted == labels).double().mean().item():.1%}")

# %% [markdown]
# ## 6. A red circle
# Drawn around a region it makes a model look there: which half shows which class?

# %%
from vlkit.addons.inputs.red_circle import RedCircle, box_scores
from vlkit.data.resizing import Box

boxes = [Box(0, 0, size, size), Box(0, size, size, size)]
scores = box_scores(source, pair, boxes, pair_names, others=names)
for column, name in enumerate(pair_names):
    print(f"{name}: {'left' if scores[:, column].argmax() == 0 else 'right'}")
marked = RedCircle(left=0.5, width=0.5, line=1.0).edit_image(pair[None].float() / 255)[0]
plt.figure(figsize=(4, 2))
plt.imshow(marked.permute(1, 2, 0).numpy())
plt.axis("off")
