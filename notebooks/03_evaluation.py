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
# # Evaluation: embed once, score many, compare honestly
#
# Everything here runs offline on a CPU, on pictures it draws itself. Two small models are trained, measured under two
# protocols, compared item by item, and shown on one page. For published data sets the protocols are named:
# `vlkit protocols` lists them.

# %% tags=["parameters"] tiny={"num_scenes": 256, "steps": [2, 3], "num_gallery": 20, "per_class": 1}
num_scenes = 4_000  # pictures to train on
steps = [60, 400]  # of the two models
num_gallery = 300  # pictures to search
per_class = 5  # pictures of each class to name

# %% [markdown]
# ## 1. Two models
# The run behind `vlkit demo`, stopped early and late.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from data_tools.build import build_shards
from data_tools.scenes import SEEN, scene_source, write_class_folder
from vlkit.config import load_run
from vlkit.models.tokenizers import CLIP_BPE, get_tokenizer
from vlkit.training.pretrain import pretrain

work = Path("evaluation")
tokenizers = {CLIP_BPE: get_tokenizer(CLIP_BPE).encode_ragged}
build_shards(scene_source(num_scenes, seed=0), work / "shards", tokenizers=tokenizers)
build_shards(scene_source(num_gallery, seed=1), work / "gallery", tokenizers=tokenizers)
write_class_folder(work / "classes", SEEN, per_class, seed=2)
models = []
for number in steps:
    run = load_run(
        "demo", [f"run.out={work / f'run_{number}'}", f"run.steps={number}", f"data.train={work / 'shards'}"]
    )
    pretrain(run, resume=True)
    models.append(f"run:{work / f'run_{number}'}")

# %% [markdown]
# ## 2. A metric is a function of arrays
# Ranks are counted tile by tile, so neither time nor memory explode; and what ties counts half, so features without any
# meaning measure chance.

# %%
from eval.metrics import retrieval_recall

owners = torch.arange(20).repeat_interleave(3)  # three captions an image
constant = torch.ones(1, 64) / 8
print(retrieval_recall(constant.expand(20, -1), constant.expand(60, -1), owners, ks=[1, 5]))

# %% [markdown]
# ## 3. Protocols
# A protocol fixes split, captions, class names, templates and metric. Numbers of equal fingerprint may be compared.
# Published ones have names; here are two of our own, over the pictures drawn above.

# %%
from eval.protocol_data import prepare
from eval.protocols import PROTOCOLS, Protocol

print(PROTOCOLS["flickr8k-test"].settings("fp32", "reference"))
protocols = {
    Protocol("shapes", "coloured shapes", "classification", (), "accuracy@1", templates="photo"): work / "classes",
    Protocol("scenes", "drawn scenes", "retrieval", (), "mean_recall@1"): work / "gallery",
}

# %% [markdown]
# ## 4. A suite
# Models x protocols, each model loaded once. Interrupt this cell and run it again: what has a line is done.

# %%
from eval.runner import Job, run_suite
from vlkit.features.cache import FeatureCache
from vlkit.features.source import open_source

jobs = [Job(prepare(protocol, place, num_examples=8), str(place)) for protocol, place in protocols.items()]
cache = FeatureCache(work / "cache")
for line, kept in run_suite(models, jobs, work / "results", open_model=lambda name: open_source(name, "cpu", cache)):
    metric = line["protocol"]["metric"]
    low, high = line["intervals"].get(metric, (float("nan"),) * 2)
    shown = f"{line['metrics'][metric]:.1%} ({low:.1%} to {high:.1%})"
    print(f"{line['model']:<24} {line['protocol']['name']:<8} {metric} {shown}", "kept" if kept else "")

# %% [markdown]
# ## 5. Is the second model better?
# The same items, so the difference is resampled item by item. A p-value near 0 says that exchanging the two models'
# answers at random rarely gives such a difference.

# %%
from eval.compare import compare_results, load_results

first, second = load_results(f"{work / 'results'}#1")[0], load_results(f"{work / 'results'}#3")[0]
for row in compare_results(first, second).rows:
    print(f"{row.metric}: {row.difference:+.3f}, 95% from {row.low:+.3f} to {row.high:+.3f}, p = {row.p_value:.4f}")

# %% [markdown]
# ## 6. One page
# Tables that sort, curves, confusion matrices, examples: self-contained, nothing is loaded from anywhere. The figures
# lie beside it as PNG, the table as CSV, LaTeX and Markdown.

# %%
from eval.suite_report import write_suite_report

files = write_suite_report(work / "results", work / "report")
print((work / "report" / "table.md").read_text())
picture = next(path for path in files if path.name.endswith("recall_over_the_number_of_results.png"))
plt.figure(figsize=(7, 4))
plt.imshow(plt.imread(picture))
plt.axis("off")
