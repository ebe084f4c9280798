"""Published zero-shot numbers of open_clip's weights, to compare a protocol's outcome with.

Source: open_clip's results tables (docs/openclip_results.csv, openclip_retrieval_results.csv), as CLIP_benchmark
measured them: 80 ImageNet templates, Karpathy's splits, all captions. Base and new classes: Zhou et al. 2022 (CoCoOp),
arXiv:2203.05557, section 4.1, plain CLIP ViT-B/16 with CoOp's hand templates.
"""

from collections.abc import Mapping
from typing import NamedTuple

# Half a point of a percent is what another decoder or type of numbers moves; beyond this something differs.
TOLERANCE = 0.002


class Anchor(NamedTuple):
    """A published value beside a measured one."""

    published: float
    difference: float  # measured - published
    within: bool  # of the tolerance


def compare_with_published(model: str, protocol: str, metrics: Mapping[str, float]) -> dict[str, Anchor]:
    """The metrics for which a value of these weights under this protocol was published.

    Args:
        model: as the user named it; only `open_clip:ARCHITECTURE/TAG` (with or without `@FILE`) names known weights.
        protocol: its name.
        metrics: what was measured, fractions.
    """
    return _compared(_PUBLISHED.get(_weights_of(model), {}).get(protocol, {}), metrics)


def compare_base_to_new(model: str, metrics: Mapping[str, float]) -> dict[str, Anchor]:
    """The same for plain zero-shot accuracy on base and new classes of CoOp's eleven sets.

    Args:
        model: as the user named it.
        metrics: `{set}/base`, `{set}/new`; over all eleven `base`, `new` and `harmonic_mean`. Fractions.
    """
    return _compared(_BASE_TO_NEW if _weights_of(model) in _PLAIN_B16 else {}, metrics)


def _weights_of(model: str) -> str:
    scheme, _, rest = model.partition(":")
    return rest.partition("@")[0] if scheme == "open_clip" else ""


def _compared(values: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, Anchor]:
    return {
        key: Anchor(value, metrics[key] - value, abs(metrics[key] - value) <= TOLERANCE)
        for key, value in values.items()
        if key in metrics
    }


def has_published(protocol: str) -> bool:
    """Whether any weights have published numbers under a protocol."""
    return any(protocol in rows for rows in _PUBLISHED.values())


def _row(numbers: str) -> dict[str, dict[str, float]]:
    """ImageNet, ImageNet-V2, then recall@1/5/10: COCO by text, by image, Flickr30k by text, by image."""
    values = [float(number) for number in numbers.split()]
    recalls = [f"{direction}/recall@{k}" for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    return {
        "imagenet-80": {"accuracy@1": values[0]},
        "imagenet-v2-80": {"accuracy@1": values[1]},
        "coco5k-karpathy": dict(zip(recalls, values[2:8], strict=True)),
        "flickr1k": dict(zip(recalls, values[8:14], strict=True)),
    }


_PUBLISHED = {
    "RN50/openai": _row(".5982 .5284 .285 .529 .646 .488 .728 .821 .574 .832 .900 .800 .950 .979"),
    "ViT-B-32/openai": _row(".6332 .5592 .304 .559 .669 .501 .750 .835 .588 .836 .900 .789 .949 .982"),
    "ViT-B-32/laion2b_s34b_b79k": _row(".6656 .5814 .393 .654 .756 .563 .798 .871 .668 .884 .931 .841 .962 .983"),
    "ViT-B-32/datacomp_xl_s13b_b90k": _row(".6917 .6075 .371 .624 .727 .535 .778 .860 .611 .849 .909 .790 .939 .962"),
    "ViT-B-32-256/datacomp_s34b_b86k": _row(".7281 .6481 .399 .654 .752 .579 .806 .881 .649 .872 .922 .848 .967 .985"),
    "ViT-B-16/openai": _row(".6834 .6188 .331 .584 .690 .524 .767 .846 .622 .857 .919 .822 .966 .990"),
    "ViT-B-16/laion2b_s34b_b88k": _row(".7023 .6228 .423 .677 .771 .594 .818 .886 .698 .904 .946 .863 .979 .994"),
    "ViT-B-16/datacomp_xl_s13b_b90k": _row(".7349 .6598 .402 .660 .756 .574 .809 .883 .676 .883 .930 .851 .972 .984"),
    "ViT-B-16/dfn2b": _row(".7624 .6818 .434 .692 .788 .604 .831 .895 .691 .898 .941 .854 .978 .986"),
    "ViT-B-16-SigLIP/webli": _row(".7604 .6893 .478 .724 .810 .657 .854 .913 .747 .923 .956 .891 .980 .993"),
    "ViT-L-14/openai": _row(".7554 .6983 .365 .611 .711 .563 .794 .866 .650 .872 .920 .852 .974 .992"),
    "ViT-L-14-336/openai": _row(".7656 .7089 .371 .616 .715 .579 .812 .879 .669 .890 .933 .877 .985 .994"),
    "ViT-L-14/laion2b_s32b_b82k": _row(".7525 .6780 .465 .711 .798 .634 .840 .907 .755 .929 .959 .895 .987 .994"),
    "ViT-L-14/datacomp_xl_s13b_b90k": _row(".7921 .7205 .457 .700 .792 .633 .841 .904 .734 .917 .955 .890 .986 .997"),
    "ViT-L-14-quickgelu/dfn2b": _row(".8141 .7461 .486 .738 .824 .656 .858 .912 .755 .928 .961 .896 .985 .993"),
    "ViT-H-14/laion2b_s32b_b79k": _row(".7796 .7090 .495 .734 .815 .659 .861 .919 .776 .942 .966 .907 .992 .997"),
    "ViT-bigG-14/laion2b_s39b_b160k": _row(".8009 .7359 .514 .749 .830 .674 .869 .927 .796 .950 .971 .929 .993 .998"),
    "ViT-SO400M-14-SigLIP-384/webli": _row(".8308 .7717 .542 .768 .842 .724 .900 .945 .830 .961 .980 .943 .997 .998"),
    "ViT-H-14-378-quickgelu/dfn5b": _row(".8437 .7833 .556 .792 .863 .719 .905 .950 .820 .960 .980 .940 .992 .996"),
}


def _halves(**sets: tuple[float, float]) -> dict[str, float]:
    """Accuracy in per cent on base and new classes, with the means and their harmonic mean as printed."""
    rows = {f"{name.replace('_', '-')}/base": base / 100 for name, (base, _) in sets.items()}
    rows |= {f"{name.replace('_', '-')}/new": new / 100 for name, (_, new) in sets.items()}
    return rows | {"base": 0.6934, "new": 0.7422, "harmonic_mean": 0.7170}


_PLAIN_B16 = ("ViT-B-16/openai", "ViT-B-16-quickgelu/openai")
_BASE_TO_NEW = _halves(
    imagenet=(72.43, 68.14), caltech101=(96.84, 94.00), oxford_pets=(91.17, 97.26), stanford_cars=(63.37, 74.89),
    flowers102=(72.08, 77.80), food101=(90.10, 91.22), fgvc_aircraft=(27.19, 36.29), sun397=(69.36, 75.35),
    dtd=(53.24, 59.90), eurosat=(56.48, 64.05), ucf101=(70.53, 77.50),
)  # fmt: skip
