"""What takes the place of the cosine; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "calip": MethodRow(
        name="calip",
        slot="pair_scores",
        needs="patches in the joint space; validation labels choose the two weights",
        cost="a product of all patches with all classes",
        source="Guo et al. 2023, arXiv:2209.14169",
        when="Classification of objects that fill little of the image, without training.",
    ),
    "pacl": MethodRow(
        name="pacl",
        slot="pair_scores",
        needs="patch tokens; a head from a run with [loss.patch_alignment], or images with captions to train one",
        cost="two small layers a patch, and the attention of every text over every image's patches",
        source="Mukhoti et al. 2023, arXiv:2212.04994",
        when="Segmentation and classification by patches, where image-text pairs are there to train the head on.",
    ),
}
