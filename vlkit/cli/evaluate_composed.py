"""`vlkit eval composed-retrieval | conditional-retrieval`: an image and words ask for another image."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlkit.cli.addon_options import AddOns, pipeline_of
from vlkit.cli.console import progress_bar, say
from vlkit.cli.evaluate_common import Images, Shared, Split, with_shared_options
from vlkit.cli.evaluate_options import Seed
from vlkit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from eval.combiner import Combiner, CombinerSettings
    from eval.composed_retrieval import ComposedSet
    from vlkit.addons.pipeline import Pipeline
    from vlkit.features.source import FeatureSource


@with_shared_options
def composed_retrieval(
    shared: Shared,
    data: Annotated[str, typer.Option(help="Folder of the data set.")],
    form: Annotated[
        str,
        typer.Option(
            help="cirr, patterncom, domains (FreeDom's `path domain class` files), or objects: a substitute made from "
            "COCO's instances."
        ),
    ],
    images: Images = None,
    split: Split = None,
    addon: AddOns = None,
    captions: Annotated[
        str | None, typer.Option(help="Images with captions whose nouns are freedom's words; never the tested ones.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Image and words together ask for images: mAP, recall and hits, beside image alone and words alone.

    `--addon weicom:share=0.3`, `arithmetic:rule=product` or `freedom` joins the two; default: the mean.
    """
    from eval.composed_retrieval import ComposedRetrievalEvaluator
    from vlkit.data.records import Source

    pipeline = pipeline_of(addon)
    chosen = _composed_set(form, data, images, split)
    for reason, count in chosen.left_out:
        if count:
            say(f"left out: {count} {reason.replace('_', ' ')}")
    evaluator = ComposedRetrievalEvaluator(chosen, batch_size=shared.batch_size, workers=shared.workers, seed=seed)
    embedder = shared.source()
    fitted = _fitted(pipeline, embedder, captions)
    with progress_bar("composed-retrieval", "images and texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder, fitted)
    title = f"{evaluation.counts['queries']} queries, {evaluation.counts['images']} images, {chosen.how}"
    shared.finish(evaluation, "composed-retrieval", embedder, data, Source((), form, Path(data)), title, split)


def _composed_set(form: str, data: str, images: Path | None, split: str | None) -> "ComposedSet":
    from eval.coco_instances import read_instances
    from eval.composed_sets import FORMS, add_objects, read_cirr, read_domains, read_patterncom

    if form not in FORMS:
        raise ConfigError(f"Unknown form {form!r}. {did_you_mean(form, FORMS)}")
    if split is not None and form != "cirr":
        raise ConfigError(f"--split has no effect with --form {form}. Leave it out.")
    if form == "cirr":
        return read_cirr(data, split or "val", images)
    if form == "objects":
        return add_objects(read_instances(data, images))
    return read_patterncom(data, images) if form == "patterncom" else read_domains(data, images)


def _fitted(pipeline: "Pipeline", embedder: "FeatureSource", captions: str | None) -> "Pipeline":
    from vlkit.addons.exchange import Vectors
    from vlkit.addons.reference import Captions, Reference
    from vlkit.data.sources import read_source

    if not pipeline.addons:
        if captions is not None:
            raise ConfigError("--captions has no effect without --addon freedom. Leave it out.")
        return pipeline
    found = None
    if captions is not None:
        records = [record for record in read_source(captions).records if record.split in (None, "train")]
        texts = tuple(text for record in records for text in record.captions)
        say(f"{len(texts)} captions of {captions}")
        found = Captions(texts, Vectors("text", embedder.embed_texts(texts)), "train")
    return pipeline.fit(Reference(task="retrieval", captions=found), embedder)


@with_shared_options
def conditional_retrieval(
    shared: Shared,
    data: Annotated[str, typer.Option(help="Folder of GeneCIS's files, or COCO's instances with --form objects.")],
    form: Annotated[
        str, typer.Option(help="genecis (focus_object.json or .pkl, ...), or objects: a substitute from COCO's masks.")
    ],
    images: Images = None,
    num_distractors: Annotated[int, typer.Option(min=1, help="With --form objects.")] = 14,
    combiner: Annotated[
        Path | None, typer.Option(help="Folder of a trained head that makes queries; with --captions it is trained.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Images with captions to train --combiner on; never the tested ones.")
    ] = None,
    num_triplets: Annotated[int, typer.Option(min=3, help="With --captions: mined triplets.")] = 20_000,
    epochs: Annotated[int, typer.Option(min=1, help="With --captions: passes over the triplets.")] = 6,
    lr: Annotated[float, typer.Option(help="With --captions: learning rate.")] = 1e-4,
    concreteness: Annotated[
        Path | None, typer.Option(help="With --captions: words with how concrete they are, 1 to 5 (Brysbaert's table).")
    ] = None,
    seed: Seed = 0,
) -> None:
    """GeneCIS: one reference image, a condition, and a small gallery; recall@1, 2 and 3.

    --captions DATA --combiner FOLDER trains GeneCIS's combiner on frozen features and measures it beside the mean.
    """
    from eval.coco_instances import read_instances
    from eval.combiner import CombinerSettings
    from eval.conditional_retrieval import ConditionalRetrievalEvaluator
    from eval.conditional_sets import object_conditions, read_genecis
    from vlkit.data.records import Source

    if form not in ("genecis", "objects"):
        raise ConfigError(f"Unknown form {form!r}. {did_you_mean(form, ('genecis', 'objects'))}")
    if form == "genecis":
        if images is None:
            raise ConfigError("GeneCIS's files name photographs of COCO and Visual Genome; say where: --images DIR.")
        found = read_genecis(data, images)
    else:
        found = object_conditions(read_instances(data, images), num_distractors, seed)
    if captions is not None and combiner is None:
        raise ConfigError("--captions trains a combiner; say where it goes: --combiner FOLDER.")
    embedder = shared.source()
    head = None
    if combiner is not None:
        settings = CombinerSettings(epochs=epochs, lr=lr, seed=seed)
        head = _combiner(combiner, captions, num_triplets, concreteness, settings, embedder, shared)
    evaluator = ConditionalRetrievalEvaluator(found, shared.batch_size, shared.workers, seed, combiner=head)
    with progress_bar("conditional-retrieval", "images and texts") as tick:
        evaluation = replace(evaluator, progress=tick).run(embedder)
    title = f"{evaluation.counts['queries']} queries, {found.how}"
    shared.finish(evaluation, "conditional-retrieval", embedder, data, Source((), form, Path(data)), title)


def _combiner(
    folder: Path,
    captions: str | None,
    num_triplets: int,
    concreteness: Path | None,
    settings: "CombinerSettings",
    embedder: "FeatureSource",
    shared: Shared,
) -> "Combiner":
    """The head in a folder; with captions it is trained and put there first."""
    from eval.caption_triplets import mine_triplets, read_concreteness, read_facts
    from eval.combiner import load_combiner, save_combiner, train_combiner
    from eval.features import embed_records
    from vlkit.data.sources import read_source

    if captions is None:
        return load_combiner(folder, embedder.identity)
    words = None if concreteness is None else read_concreteness(concreteness)
    records = [one for one in read_source(captions).records if one.split in (None, "train") and one.captions]
    facts = read_facts(records)
    mined = mine_triplets(facts, num_triplets, words, seed=settings.seed)
    say(f"{len(mined)} triplets from {len(facts)} facts in the captions of {len(records)} images of {captions}")
    with progress_bar("images of the triplets", "images") as tick:
        read = embed_records(embedder, records, shared.batch_size, shared.workers, tick)
    if read.unreadable:
        say(f"{len(read.unreadable)} images cannot be read; their triplets are left out.")
    place = {record.key: row for row, record in enumerate(read.records)}
    mined = mined.among([place.get(record.key, -1) for record in records])
    texts = embedder.embed_texts(mined.conditions)
    with progress_bar("combiner", "steps") as tick:
        made = train_combiner(read.features, texts, mined, settings, tick)
    save_combiner(folder, made, settings, embedder.identity)
    say(f"combiner written to {folder}")
    return made
