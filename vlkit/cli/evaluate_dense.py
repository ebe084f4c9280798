"""`vlkit eval segmentation | referring | pointing | explanation`: where things are, not only what."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlkit.cli.addon_options import AddOns, pipeline_of
from vlkit.cli.console import progress_bar, say
from vlkit.cli.evaluate_common import Images, Shared, Split, with_shared_options
from vlkit.cli.evaluate_options import Seed, parse_numbers, read_lines_of
from vlkit.cli.options import Templates
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from eval.coco_instances import Scenes
    from vlkit.contracts import Evaluation
    from vlkit.data.records import Source

InstanceData = Annotated[
    str, typer.Option(help="COCO's instances_*.json or its folder; or a folder with images/, labels/, names.txt.")
]
HeatMethod = Annotated[
    str, typer.Option(help="patches (cosine), decomposition, legrad, relevance, or centre: looks at nothing.")
]
Pictures = Annotated[Path | None, typer.Option(help="Also write pictures into this folder.")]


@with_shared_options
def segmentation(
    shared: Shared,
    data: InstanceData,
    images: Images = None,
    names: Annotated[
        Path | None, typer.Option(help="A line a category in the file's order: `name | synonym`; default: its names.")
    ] = None,
    templates: Templates = "imagenet80",
    background: Annotated[
        Literal["ignored", "class"], typer.Option(help="Pixels without an object: do not count, or are a class.")
    ] = "ignored",
    threshold: Annotated[float, typer.Option(help="Below this probability a pixel is background.")] = 0.0,
    logit_scale: Annotated[float | None, typer.Option(help="Of the softmax; default the model's own.")] = None,
    denoise: Annotated[float, typer.Option(help="Leave out names nowhere more probable than this.")] = 0.0,
    short_side: Annotated[int | None, typer.Option(min=1, help="Of the resized photo; default 1.5 windows.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Of the window; default half of it.")] = None,
    refine: Annotated[
        int, typer.Option(min=0, help="Steps of PAMR: scores flow between pixels that look alike (SCLIP: 10).")
    ] = 0,
    refine_dilations: Annotated[str, typer.Option(help="Distances of PAMR's neighbours, in pixels.")] = "8,16",
    addon: AddOns = None,
    pictures: Pictures = None,
    num_pictures: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 12,
    seed: Seed = 0,
) -> None:
    """Zero-shot segmentation: mIoU of class names against masks, patch scores under a sliding window."""
    from eval.segmentation import SegmentationEvaluator
    from vlkit.addons.class_names import parse_class_list
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    pipeline = pipeline_of(addon)
    scenes, source = read_scenes(data, images)
    named = None
    if names is not None:
        lines = read_lines_of(names, "names")
        parse_class_list(lines, str(names))
        named = lines
    evaluator = SegmentationEvaluator(
        scenes,
        named,
        templates,
        background,
        threshold,
        logit_scale,
        denoise,
        short_side,
        stride,
        refine,
        parse_numbers(refine_dilations, "--refine-dilations"),
        pictures,
        num_pictures,
        seed,
        shared.num_examples,
    )
    embedder = shared.source()
    if pipeline.addons and not pipeline.fitted:
        from vlkit.cli.addon_options import fitted_on_names

        pipeline = fitted_on_names(
            pipeline, embedder, parse_class_list(named or scenes.names), load_templates(templates)
        )
    with progress_bar("segmentation", "images") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder, pipeline)
    title = f"{evaluation.counts['images']} images, {evaluation.counts['classes']} classes, background {background}"
    shared.finish(evaluation, "segmentation", embedder, data, source, title)


@with_shared_options
def referring(
    shared: Shared,
    data: Annotated[
        str, typer.Option(help="COCO's instances, or RefCOCO's `refs(...).p` with instances.json beside it.")
    ],
    form: Annotated[
        Literal["objects", "refcoco"], typer.Option(help="objects: a substitute, names of objects that stand alone.")
    ] = "objects",
    images: Images = None,
    split: Split = None,
    views: Annotated[
        str, typer.Option(help="crop, circle, grey, blur, with commas: their scores are summed.")
    ] = "crop",
    template: Annotated[str, typer.Option(help="Of an expression.")] = "a photo of {}",
    num_others: Annotated[
        int, typer.Option(min=0, help="Texts of the set whose mean score is subtracted (the paper's 500).")
    ] = 0,
    seed: Seed = 0,
) -> None:
    """Referring expressions: which of an image's boxes a text means."""
    from eval.grounding import ReferringEvaluator
    from eval.referring_sets import read_refcoco, unique_objects
    from vlkit.data.records import Source

    if form == "refcoco":
        if images is None:
            raise ConfigError("RefCOCO's files name photographs of COCO; say where they are: --images DIR.")
        expressions, missing = read_refcoco(data, images, split or "val")
        say(f"left out: {missing} sentences without their photograph or a second box")
        source = Source((), form, Path(data))
    else:
        if split is not None:
            raise ConfigError("--split has no effect with --form objects. Leave it out.")
        scenes, source = read_scenes(data, images)
        expressions = unique_objects(scenes)
    shown: tuple[Any, ...] = tuple(view.strip() for view in views.split(","))
    evaluator = ReferringEvaluator(expressions, shown, template, num_others, shared.batch_size, shared.workers, seed)

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['expressions']} expressions, {evaluation.counts['boxes']} boxes, {form}"

    shared.run(evaluator, "referring", "views", data=data, source=source, title=title, split=split)


@with_shared_options
def pointing(
    shared: Shared,
    data: InstanceData,
    images: Images = None,
    method: HeatMethod = "patches",
    templates: Templates = "photo",
    tolerance: Annotated[float, typer.Option(min=0, help="Pixels that a point may lie beside a box.")] = 15.0,
    seed: Seed = 0,
) -> None:
    """The pointing game: whether the hottest point of a class's heat map lies on a thing of that class."""
    from eval.pointing import PointingEvaluator
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    scenes, source = read_scenes(data, images)
    evaluator = PointingEvaluator(scenes, method, templates, tolerance, seed, shared.num_examples)

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['pairs']} photographs and categories, {method}"

    shared.run(evaluator, "pointing", "images", data=data, source=source, title=title)


@with_shared_options
def explanation(
    shared: Shared,
    data: InstanceData,
    images: Images = None,
    method: HeatMethod = "legrad",
    templates: Templates = "photo",
    seed: Seed = 0,
) -> None:
    """Heat maps against masks (pixel accuracy, mIoU, AP), and deletion and insertion of the patches they name."""
    from eval.explanation import ExplanationEvaluator
    from vlkit.addons.class_weights.templates import load_templates

    load_templates(templates)
    scenes, source = read_scenes(data, images)
    evaluator = ExplanationEvaluator(scenes, method, templates, seed, shared.num_examples)

    def title(evaluation: "Evaluation") -> str:
        return f"{evaluation.counts['images']} photographs, {method}"

    shared.run(evaluator, "explanation", "images", data=data, source=source, title=title)


def read_scenes(data: str, images: Path | None) -> "tuple[Scenes, Source]":
    """Photographs with objects, and what stands for them in the line of the result."""
    from eval.coco_instances import read_instances
    from eval.label_folders import is_label_folder, read_label_folder
    from vlkit.data.records import Source

    scenes = read_label_folder(data) if is_label_folder(data) else read_instances(data, images)
    records = tuple(scene.record for scene in scenes.images)
    source = Source(records, "coco_instances", scenes.root, scenes.names, scenes.problems)
    say(f"{scenes.root}: {len(scenes.images)} photographs with objects, {len(scenes.names)} categories")
    for line in scenes.problems.lines():
        say(f"left out: {line}")
    return scenes, source
