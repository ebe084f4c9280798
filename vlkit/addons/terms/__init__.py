"""What adds to the logits of each image and class; one method a file."""

from vlkit.contracts import MethodRow

METHODS: dict[str, MethodRow] = {
    "tip_adapter": MethodRow(
        name="tip_adapter",
        slot="terms",
        needs="few-shot labels; validation labels choose alpha and beta",
        cost="one product with shots x C keys; fitting is one pass over the few-shot images in ten views",
        source="Zhang et al. 2022, arXiv:2207.09519",
        when="A few labelled images a class and no time to train anything.",
    ),
    "tip_adapter_f": MethodRow(
        name="tip_adapter_f",
        slot="terms",
        needs="few-shot labels; validation labels choose alpha and beta",
        cost="one product with shots x C keys; fitting trains the keys for 20 epochs on features, seconds",
        source="Zhang et al. 2022, arXiv:2207.09519",
        when="A few labelled images a class: the cache, with its keys trained.",
    ),
    "tip_x": MethodRow(
        name="tip_x",
        slot="terms",
        needs="few-shot labels; validation labels choose alpha, beta and gamma",
        cost="one product with shots x C keys, for features and for class signatures; no training",
        source="Udandarao et al. 2023, arXiv:2211.16198",
        when="Images found or made by class name stand for labelled ones; similarity within images is poor.",
    ),
    "ape": MethodRow(
        name="ape",
        slot="terms",
        needs="few-shot labels; validation labels choose alpha, beta and gamma",
        cost="one product with shots x C keys on half of the channels; no training",
        source="Zhu et al. 2023, arXiv:2304.01195",
        when="As Tip-Adapter, where the classes resemble each other on many channels.",
    ),
    "ape_t": MethodRow(
        name="ape_t",
        slot="terms",
        needs="few-shot labels; validation labels choose the epoch, alpha and beta",
        cost="one product with shots x C keys; fitting takes seconds",
        source="Zhu et al. 2023, arXiv:2304.01195",
        when="As Tip-Adapter-F, with fewer trained numbers: one residual a class.",
    ),
    "tda": MethodRow(
        name="tda",
        slot="terms",
        needs="the stream of test images, without labels (transductive)",
        cost="one product with at most 5 x C keys, images in order; no fitting",
        source="Karmanov et al. 2024, arXiv:2403.18293",
        when="Images arrive one by one, nothing is labelled, and the model is right more often than not.",
    ),
    "tfup": MethodRow(
        name="tfup",
        slot="terms",
        needs="all test images, without labels (transductive)",
        cost="one product with 9 to 16 x C keys, for features and for class signatures; no training",
        source="Long et al. 2024, arXiv:2404.16339",
        when="All test images are there beforehand, nothing is labelled.",
    ),
    "tfup_t": MethodRow(
        name="tfup_t",
        slot="terms",
        needs="all test images, without labels (transductive)",
        cost="a small network and one product with 9 to 16 x C keys; fitting takes seconds",
        source="Long et al. 2024, arXiv:2404.16339",
        when="As TFUP, with a model sure enough of many images for them to be its teachers.",
    ),
    "knn": MethodRow(
        name="knn",
        slot="terms",
        needs="few-shot labels; validation labels choose the share of the neighbours",
        cost="one product with shots x C keys; fitting trains a linear classifier on features, seconds",
        source="Jia et al. 2021, arXiv:2112.08459",
        when="Labels are few and the class names tell the model little.",
    ),
}
