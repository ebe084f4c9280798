"""What changes features of images, of texts, or of both; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "inv_gc": MethodRow(
        name="inv_gc",
        slot="feature_maps",
        needs="unlabelled images, captions or class names",
        cost="none for queries; one product of the gallery with both banks",
        source="Jian and Wang 2023, arXiv:2310.13276",
        when="A gallery whose items crowd together, where vectors may change but scores may not.",
    ),
    "tta": MethodRow(
        name="tta",
        slot="feature_maps",
        needs="views of each image",
        cost="ten passes of the image tower for each image",
        source="Zhou et al. 2023, arXiv:2302.11084 (TTA)",
        when="Accuracy counts more than time, and no data of the domain are at hand; goes with distribution_norm.",
    ),
    "distribution_norm": MethodRow(
        name="distribution_norm",
        slot="feature_maps",
        needs="unlabelled images, captions or class names",
        cost="none; fitting is one pass over 100 images and 100 texts",
        source="Zhou et al. 2023, arXiv:2302.11084",
        when="A free gain where images and texts of the domain are at hand without labels.",
    ),
    "clip_adapter": MethodRow(
        name="clip_adapter",
        slot="feature_maps",
        needs="few-shot labels; validation labels choose the ratio",
        cost="a small network on each image's feature; fitting takes seconds",
        source="Gao et al. 2021, arXiv:2110.04544",
        when="A few labelled images a class, and classes that may change afterwards.",
    ),
    "task_residual": MethodRow(
        name="task_residual",
        slot="feature_maps",
        needs="few-shot labels",
        cost="none; fitting takes seconds",
        source="Yu et al. 2023, arXiv:2211.10277",
        when="A few labelled images a class, and nothing to choose.",
    ),
}
