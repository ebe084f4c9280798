"""Images a second of classifying a folder, beside the same loop written with open_clip and transformers' pipeline.

    python tests/benchmarks/classify_folder.py IMAGES [--model run:DIR] [--num-images 200] [--pipeline 10] [--json]
    python tests/benchmarks/classify_folder.py IMAGES --model random:siglip

All use the same weights: a ViT-B-32 drawn at random and saved in a temporary folder, or a trained run by --model; the
pipeline reads them as `vlkit export MODEL --to hf` writes them. `random:siglip` is a SigLIP of that size (patches of 32
on 256 pixels), whose texts the pipeline fills up to 64 tokens; open_clip's loop cannot read it, so the pipeline is its
only peer. What is timed begins when the model is loaded: class
prompts, images.
The loop: pillow, open_clip's transform, batches of 64, open_clip's classifier builder with the same template. Class
weights are timed apart, with 80 templates. vlkit starts from an empty cache, runs a second time, and a third time with
other classes; what each run encodes is counted where pixels and tokens enter the towers, by hooks of torch.
`equal top-1` is the share of images given the same class by vlkit and by the loop, and by vlkit in fp32.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

TEMPLATE = "a photo of a {}."
BATCH = 64


class Line(NamedTuple):
    name: str
    case: str
    ours: float
    peer: float | None
    ratio: float | None  # ours / peer
    unit: str


class Run(NamedTuple):
    """One way of classifying a folder."""

    text_seconds: float
    image_seconds: float
    best: list[int]
    encoded: tuple[int, int] = (0, 0)  # images and texts that went through a tower
    again: int = 0  # images among them that were encoded a second time, in fp32

    @property
    def seconds(self) -> float:
        return self.text_seconds + self.image_seconds


@contextmanager
def counted_inputs() -> Iterator[list[int]]:
    """Counts rows that enter towers, images first: what a convolution over three channels or an embedding is given."""
    counts = [0, 0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            counts[0] += len(inputs[0])
        elif isinstance(module, nn.Embedding) and module.num_embeddings > inputs[0].shape[-1]:  # not of positions
            counts[1] += len(inputs[0])

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def random_model(folder: Path) -> str:
    from vlkit.models.open_clip_encoder import build_encoder
    from vlkit.models.saved import save_encoder

    torch.manual_seed(0)
    save_encoder(build_encoder("ViT-B-32"), folder)
    return f"local-dir:{folder}"


def random_siglip(folder: Path, texts: Sequence[str]) -> str:
    """A SigLIP as save_pretrained writes it, with a tokenizer of the words of these texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    numbers = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast: Any = PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids"],  # SigLIP looks at its padding
    ).save_pretrained(folder)
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text_config = {"vocab_size": len(numbers), "max_position_embeddings": 64, "projection_size": 768, **special}
    config = SiglipConfig(text_config=text_config, vision_config={"image_size": 256, "patch_size": 32})
    SiglipModel(config).save_pretrained(folder)
    size = {"height": 256, "width": 256}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3).save_pretrained(folder)
    return f"hf:{folder}"


def vlkit_run(name: str, paths: Sequence[Path], classes: Sequence[str], cache: Path, precision: Any) -> Run:
    from vlkit.addons.classifier import ZeroShotClassifier
    from vlkit.classify import Classified, SecondLook, classify_images, gather_images
    from vlkit.features.cache import FeatureCache
    from vlkit.features.source import open_sources

    records = gather_images(paths).records
    sources = open_sources(name, records, "cpu", FeatureCache(cache), precision=precision)
    with counted_inputs() as encoded:
        began = time.perf_counter()
        classifier = ZeroShotClassifier.build(sources.exact, list(classes), [TEMPLATE])
        built = time.perf_counter()
        look = None if sources.first is sources.exact else SecondLook(sources.exact, classifier)
        found = list(
            classify_images(sources.first, classifier, records, top=1, batch_size=BATCH, workers=2, second_look=look)
        )
        ended = time.perf_counter()
    index = {shown: number for number, shown in enumerate(classifier.class_names)}
    best = [index[item.classes[0][0]] for item in found if isinstance(item, Classified)]
    again = look.num_again if look else 0
    return Run(built - began, ended - built, best, (encoded[0], encoded[1]), again)


def open_clip_model(folder: Path) -> tuple[Any, Any, Any]:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


def open_clip_weights(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    import open_clip

    fill = [lambda name, text=text: text.replace("{}", name) for text in templates]
    weights: Tensor = open_clip.build_zero_shot_classifier(model, tokenizer, classes, fill, device="cpu")
    return weights


def open_clip_run(folder: Path, paths: Sequence[Path], classes: Sequence[str]) -> Run:
    model, transform, tokenizer = open_clip_model(folder)
    began = time.perf_counter()
    with torch.inference_mode():
        weights = open_clip_weights(model, tokenizer, classes, [TEMPLATE])
        built = time.perf_counter()
        best = []
        for start in range(0, len(paths), BATCH):
            images = torch.stack([transform(Image.open(path)) for path in paths[start : start + BATCH]])
            features = model.encode_image(images, normalize=True)
            best += (features @ weights).argmax(1).tolist()
    return Run(built - began, time.perf_counter() - built, best)


def pipeline_run(name: str, paths: Sequence[Path], classes: Sequence[str]) -> tuple[float, list[int]]:
    """Seconds of the transformers pipeline with the same weights, and its classes."""
    from transformers import pipeline

    from vlkit.models.export import export_hf
    from vlkit.models.load import load_encoder

    kind, _, place = name.partition(":")
    with tempfile.TemporaryDirectory() as exported:
        if kind != "hf":
            place = f"{exported}/model"
            export_hf(load_encoder(name), Path(place))
        classify: Any = pipeline("zero-shot-image-classification", model=place, device="cpu")
    index = {shown: number for number, shown in enumerate(classes)}
    best = []
    began = time.perf_counter()
    for path in paths:
        found = classify(str(path), candidate_labels=list(classes), hypothesis_template=TEMPLATE)
        best.append(index[found[0]["label"]])
    return time.perf_counter() - began, best


def class_weight_seconds(name: str, folder: Path, classes: Sequence[str], precision: Any) -> tuple[float, float]:
    """Ours and open_clip's, with 80 templates."""
    from vlkit.addons.class_weights.templates import load_templates
    from vlkit.addons.classifier import ZeroShotClassifier
    from vlkit.features.source import open_source

    templates = load_templates("imagenet80")
    # The classes of "auto" are fp32's.
    source = open_source(name, "cpu", None, precision="fp32" if precision == "auto" else precision)
    source.embed_texts(["warm up"])
    began = time.perf_counter()
    ZeroShotClassifier.build(source, list(classes), templates)
    ours = time.perf_counter() - began
    model, _, tokenizer = open_clip_model(folder)
    began = time.perf_counter()
    open_clip_weights(model, tokenizer, classes, templates)
    return ours, time.perf_counter() - began


def compare(name: str, folder: Path | None, paths: Sequence[Path], arguments: argparse.Namespace) -> Iterator[Line]:
    """All lines; without a folder that open_clip can read, those beside the pipeline."""
    names = class_names()
    classes, others = names[: arguments.num_classes], names[-arguments.num_classes :]
    case = f"{len(paths)} images x {len(classes)} classes"
    runs, peers = [], []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as cache:
            runs.append(vlkit_run(name, paths, classes, Path(cache), arguments.precision))
            second = vlkit_run(name, paths, classes, Path(cache), arguments.precision)
            third = vlkit_run(name, paths, others, Path(cache), arguments.precision)
        if folder is not None:
            peers.append(open_clip_run(folder, paths, classes))
    ours = _fastest(runs)
    speed = len(paths) / ours.seconds
    with tempfile.TemporaryDirectory() as cache:
        exact = vlkit_run(name, paths, classes, Path(cache), "fp32")
    against = [("vlkit in fp32", exact)]
    if peers:
        peer = _fastest(peers)
        against.insert(0, ("open_clip", peer))
        shown = f"{case}, open_clip"
        yield _line("classify, all in", shown, speed, len(paths) / peer.seconds, "images/s")
        mine, theirs = (len(paths) / run.image_seconds for run in (ours, peer))
        yield _line("classify, images alone", shown, mine, theirs, "images/s")
        yield _line("classes' texts", shown, ours.text_seconds, peer.text_seconds, "s")
    for who, run in against:
        yield Line("equal top-1", f"{case}, {who}", _equal(ours.best, run.best), None, None, "share")
    for which, run in (("first run", ours), ("second run", second), ("other classes", third)):
        yield Line(f"{which}: time", case, run.seconds, None, None, "s")
        yield Line(f"{which}: images encoded", f"{case}; {run.again} again in fp32", run.encoded[0], None, None, "")
        yield Line(f"{which}: texts encoded", case, run.encoded[1], None, None, "")
    if arguments.pipeline:
        seconds, found = pipeline_run(name, paths[: arguments.pipeline], classes)
        shown = f"{case}, transformers pipeline on {arguments.pipeline}"
        yield _line("classify, all in", shown, speed, arguments.pipeline / seconds, "images/s")
        yield Line("equal top-1", shown, _equal(ours.best, found), None, None, "share")
    if arguments.weight_classes and folder is not None:
        mine, theirs = class_weight_seconds(name, folder, classes[: arguments.weight_classes], arguments.precision)
        yield _line("class weights", f"{arguments.weight_classes} classes x 80 templates", mine, theirs, "s")


def class_names() -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES

    # Two ImageNet classes bear one name; a class list has each once.
    return list(dict.fromkeys(IMAGENET_CLASSNAMES))


def _fastest(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.seconds)


def _equal(first: Sequence[int], second: Sequence[int]) -> float:
    """Over the images that the second has."""
    return sum(a == b for a, b in zip(first, second, strict=False)) / len(second)


def _line(name: str, case: str, ours: float, peer: float, unit: str) -> Line:
    return Line(name, case, ours, peer, ours / peer, unit)


def show(line: Line, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line._asdict()), flush=True)
        return
    peer, ratio = ("-", "-") if line.peer is None else (f"{line.peer:.3f}", f"{line.ratio:.2f}")
    print(f"{line.name:<24} {line.case:<58} {line.ours:>9.3f} {peer:>9} {ratio:>7} {line.unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--model", help="run:DIR, local-dir:DIR or random:siglip; default: a random ViT-B-32")
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--weight-classes", type=int, default=20)
    parser.add_argument("--pipeline", type=int, default=10, help="images for the pipeline; 0 leaves it out")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of vlkit's weights")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    paths = sorted(arguments.images.rglob("*.jpg"))
    paths = paths[:: max(1, len(paths) // arguments.num_images)][: arguments.num_images]  # of all folders
    with tempfile.TemporaryDirectory() as temporary:
        from vlkit.models.saved import model_folder_of_run

        made = Path(temporary) / "model"
        if arguments.model == "random:siglip":
            texts = [TEMPLATE.format(name) for name in class_names()]
            name, folder = random_siglip(made, texts), None
        else:
            name = arguments.model or random_model(made)
            folder = model_folder_of_run(name.partition(":")[2])
        for line in compare(name, folder, paths, arguments):
            show(line, arguments.json)


if __name__ == "__main__":
    main()
