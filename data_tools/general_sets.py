"""The training data of the run `general_small`: three sets of very different pictures as shards.

    build_general_sets(Path(os.environ["VLKIT_DATA"]), Path("shards/general"))

Photographs of people and animals with captions (Flickr8k), small photographs of 200 kinds of things
(Tiny ImageNet) and drawings (Noto emoji). What has a class but no sentence gets captions through templates;
a class with an everyday kind (`Chihuahua`: dog) also gets captions that name it, since the classes of other data
sets are mostly such kinds.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from data_tools.build import BuildReport, build_shards
from data_tools.write_shard import Tokenize
from vlkit.contracts import Progress
from vlkit.data.records import Record, Source
from vlkit.data.sources import read_source

MAX_SIDE = 96  # pixels; the encoder sees 64, and random crops want a little more

# WordNet names of Tiny ImageNet by the everyday word for what they are.
KINDS: Mapping[str, tuple[str, ...]] = {
    "bird": ("black stork", "goose", "albatross", "king penguin"),
    "bridge": ("steel arch bridge", "suspension bridge", "viaduct"),
    "building": ("barn", "cliff dwelling", "thatch", "water tower", "barbershop", "butcher shop", "confectionery"),
    "bus": ("school bus", "trolleybus"),
    "butterfly": ("monarch", "sulphur butterfly"),
    "car": ("convertible", "limousine", "sports car", "beach wagon"),
    "cat": ("tabby", "Egyptian cat", "Persian cat"),
    "chair": ("rocking chair",),
    "clothes": (
        *("academic gown", "apron", "bikini", "cardigan", "fur coat", "kimono", "military uniform", "miniskirt"),
        *("poncho", "swimming trunks", "vestment"),
    ),
    "crab": ("American lobster", "spiny lobster"),
    "dog": (
        *("Chihuahua", "golden retriever", "German shepherd", "Labrador retriever", "standard poodle"),
        "Yorkshire terrier",
    ),
    "elephant": ("African elephant",),
    "fish": ("goldfish",),
    "food": (
        *("espresso", "guacamole", "ice cream", "ice lolly", "mashed potato", "meat loaf", "pizza", "plate", "potpie"),
        "pretzel",
    ),
    "frog": ("bullfrog", "tailed frog"),
    "fruit": ("banana", "lemon", "orange", "pomegranate", "acorn"),
    "insect": (
        *("bee", "cockroach", "dragonfly", "fly", "grasshopper", "ladybug", "mantis"),
        *("monarch", "sulphur butterfly"),
    ),
    "landscape": ("alp", "cliff", "lakeside", "seashore"),
    "monkey": ("baboon", "chimpanzee", "orangutan"),
    "musical instrument": ("brass", "oboe", "organ", "drumstick"),
    "sea animal": ("brain coral", "coral reef", "dugong", "jellyfish", "sea cucumber", "sea slug"),
    "ship": ("gondola", "lifeboat"),
    "snake": ("boa constrictor",),
    "spider": ("black widow", "tarantula", "spider web", "scorpion"),
    "train": ("bullet train", "freight car"),
    "truck": ("moving van", "police van", "tractor"),
    "vegetable": ("bell pepper", "cauliflower", "mushroom"),
    "wild animal": (
        *("American alligator", "Arabian camel", "bighorn", "bison", "brown bear", "cougar", "gazelle", "koala"),
        *("lesser panda", "lion", "European fire salamander"),
    ),
    "cart": ("jinrikisha", "go-kart"),
}
CLASS_TEMPLATES = ("a photo of a {}.", "a {}", "a picture of the {}.")
KIND_TEMPLATES = ("a photo of a {kind}.", "a {name}, a kind of {kind}")
DRAWING_TEMPLATES = ("a drawing of a {}.", "{}")


def build_general_sets(
    data: Path,
    out: Path,
    *,
    tokenizers: Mapping[str, Tokenize] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, BuildReport]:
    """Build (or continue) the shards; each set is a folder below `out`.

    Args:
        data: folder that holds `flickr8k`, `tiny_imagenet_shards` and `noto_emoji`.
        out: gets `flickr8k`, `flickr8k_again` (the same in another order: an epoch has each of its images twice),
            `flickr8k_dev`, `tiny_imagenet` and `noto_emoji`.
        tokenizers: tokenizer id -> function from texts to token ids, stored in the index.
        workers: processes.
        progress: called with (records done, records) of one set after the other.

    Raises:
        DataError: a set is missing or broken.
    """
    sources: dict[str, Callable[[], Source]] = {
        "flickr8k": lambda: read_source(data / "flickr8k", format="flickr8k", split="train"),
        "flickr8k_again": lambda: read_source(data / "flickr8k", format="flickr8k", split="train"),
        "flickr8k_dev": lambda: read_source(data / "flickr8k", format="flickr8k", split="dev"),
        "tiny_imagenet": lambda: tiny_imagenet(data / "tiny_imagenet_shards"),
        "noto_emoji": lambda: noto_emoji(data / "noto_emoji"),
    }
    return {
        name: build_shards(
            read(),
            out / name,
            max_side=MAX_SIDE,
            tokenizers=tokenizers,
            shuffle=name == "flickr8k_again",
            workers=workers,
            progress=progress,
        )
        for name, read in sources.items()
    }


def tiny_imagenet(folder: Path) -> Source:
    """Tiny ImageNet with captions through templates of the class name and of its everyday kind."""
    return _recaptioned(read_source(folder, format="webdataset"), class_captions)


def noto_emoji(folder: Path) -> Source:
    """The emoji with captions that call them drawings, and with their keywords as one caption."""
    source = read_source(folder / "metadata.csv", image_column="file", caption_column="keywords")
    return _recaptioned(source, drawing_captions)


def class_captions(name: str) -> tuple[str, ...]:
    """Captions of a picture of which only the class is known."""
    kinds = [kind for kind, names in KINDS.items() if name in names]
    general = [template.format(name=name, kind=kind) for kind in kinds for template in KIND_TEMPLATES]
    return (*(template.replace("{}", name) for template in CLASS_TEMPLATES), *general)


def drawing_captions(keywords: str) -> tuple[str, ...]:
    """Captions of a drawing; of the words between the bars the first is its name."""
    words = [word.strip() for word in keywords.split("|") if word.strip()]
    name = words[0] if words else "sign"
    return (*(template.replace("{}", name) for template in DRAWING_TEMPLATES), ", ".join(words[:8]) or name)


def _recaptioned(source: Source, captions: Callable[[str], tuple[str, ...]]) -> Source:
    records = tuple(_with_captions(record, captions) for record in source.records)
    return replace(source, records=records)


def _with_captions(record: Record, captions: Callable[[str], tuple[str, ...]]) -> Record:
    return replace(record, captions=captions(record.captions[0])) if record.captions else record
