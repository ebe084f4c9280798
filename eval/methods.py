"""The rows of evaluators in `vlkit methods`."""

from vlkit.contracts import MethodRow

_NONE = "none beyond the features"


def _row(name: str, needs: str, cost: str, source: str, when: str) -> MethodRow:
    return MethodRow(name, "evaluator", needs, cost, source, when)


# Keys are the modules of this package that hold an evaluator.
METHODS: dict[str, MethodRow] = {
    "base_to_new": _row(
        "base_to_new",
        "labelled images of every class",
        "two evaluations",
        "Zhou et al. 2022, arXiv:2203.05557",
        "Whether what was learned on half of the classes helps or harms the other half.",
    ),
    "blind_pairs": _row(
        "blind_pairs",
        "pairs of images with a statement each",
        _NONE,
        "Tong et al. 2024, arXiv:2401.06209 (MMVP)",
        "Whether the model sees a plain difference between two images.",
    ),
    "caption_judgement": _row(
        "caption_judgement",
        "images, captions and people's scores of them",
        _NONE,
        "Hessel et al. 2021, arXiv:2104.08718",
        "Whether the model orders captions as people do.",
    ),
    "classification": _row(
        "classification",
        "labelled images, class names",
        _NONE,
        "Radford et al. 2021, arXiv:2103.00020",
        "Zero-shot accuracy on a folder of class folders.",
    ),
    "cluster_and_name": _row(
        "cluster_and_name",
        "images; words or captions to name clusters",
        "training a small head on the features, an eigenproblem",
        "Chu et al. 2024, arXiv:2306.05272 (CPP)",
        "A folder without labels: what groups it falls into, how many, and what they show.",
    ),
    "combiner": _row(
        "combiner",
        "references with a condition; other images with captions to mine triplets from",
        "training a small head on the features of those images",
        "Vaze et al. 2023, arXiv:2306.07969; Baldrati et al. 2022 (CLIP4Cir)",
        "A query out of an image and words where their mean points to neither.",
    ),
    "composed_retrieval": _row(
        "composed_retrieval",
        "queries of an image and words, and a gallery",
        _NONE,
        "Liu et al. 2021, arXiv:2108.04024; Psomas et al. 2024, arXiv:2405.15587",
        "Whether an image and words together find what neither finds alone.",
    ),
    "conditional_retrieval": _row(
        "conditional_retrieval",
        "references with a condition and a small gallery each",
        _NONE,
        "Vaze et al. 2023, arXiv:2306.07969 (GeneCIS)",
        "Whether similarity follows the condition that is asked for.",
    ),
    "doubly_right": _row(
        "doubly_right",
        "labelled images with the reason for their class as caption",
        _NONE,
        "Mao et al. 2023, arXiv:2212.06202",
        "Whether the class is right for the right reason.",
    ),
    "explanation": _row(
        "explanation",
        "photographs with masks, a CLIP ViT",
        "a heat map and 22 more passes a photograph",
        "Chefer et al. 2021, arXiv:2103.15679; Petsiuk et al. 2018, arXiv:1806.07421",
        "Whether heat maps cover the thing, and whether what they name decides the score.",
    ),
    "few_shot": _row(
        "few_shot",
        "labelled images, train and test",
        "a logistic regression for each number of shots and draw",
        "Zhou et al. 2022, arXiv:2109.01134",
        "How much a few labels are worth with plain features.",
    ),
    "folds": _row(
        "folds",
        "images with captions",
        _NONE,
        "Karpathy and Li 2015, arXiv:1412.2306",
        "Retrieval within parts of equal size: COCO's 1k is the mean over five folds.",
    ),
    "grounding": _row(
        "grounding",
        "expressions with the boxes they choose from",
        "a pass for each box and view",
        "Shtedritski et al. 2023, arXiv:2304.06712 (protocol)",
        "Whether the model knows which thing in an image a text means.",
    ),
    "image_caption_choice": _row(
        "image_caption_choice",
        "images with right and wrong captions",
        _NONE,
        "Thrush et al. 2022, arXiv:2204.03162; Hsieh et al. 2023, arXiv:2306.14610",
        "Whether the model tells captions apart that differ in order or in a word.",
    ),
    "image_retrieval": _row(
        "image_retrieval",
        "labelled images, or lists of right answers",
        _NONE,
        "Radenovic et al. 2018, arXiv:1803.11285",
        "How well image features find images of the same thing.",
    ),
    "knn": _row(
        "knn",
        "labelled images, train and test",
        "one product of test and train features",
        "Wu et al. 2018, arXiv:1805.01978",
        "A look at the features without training anything.",
    ),
    "mask_refinement": _row(
        "mask_refinement",
        "photographs with masks of categories, patches in the joint space",
        "steps x 16 passes over the scores of every pixel",
        "Araslanov and Roth 2020, arXiv:2005.08104 (PAMR)",
        "Segmentations whose edges should follow those of the photograph.",
    ),
    "mined_pairs": _row(
        "mined_pairs",
        "images, a second model; captions to score what is found",
        "the features of both models, and all pairs of images",
        "Tong et al. 2024, arXiv:2401.06209, section 2",
        "To find images that the model takes for the same although they are not.",
    ),
    "multi_label": _row(
        "multi_label",
        "images with all their classes",
        _NONE,
        "Everingham et al. 2010 (VOC), average precision over classes",
        "Images that show several things at a time.",
    ),
    "ood": _row(
        "ood",
        "images of known and of other classes",
        _NONE,
        "Ming et al. 2022, arXiv:2211.13445",
        "Whether scores tell images that belong to none of the classes.",
    ),
    "pointing": _row(
        "pointing",
        "photographs with boxes, patches in the joint space or a CLIP ViT",
        "a heat map a photograph",
        "Zhang et al. 2018, arXiv:1608.00507",
        "Whether the hottest point of a heat map lies on the thing.",
    ),
    "probe": _row(
        "probe",
        "labelled images, train and test",
        "one logistic regression with a search of its strength",
        "Radford et al. 2021, arXiv:2103.00020",
        "What the image features hold, whatever the texts.",
    ),
    "retrieval": _row(
        "retrieval",
        "images with captions",
        _NONE,
        "Karpathy and Li 2015, arXiv:1412.2306",
        "Recall of image-text retrieval in both directions.",
    ),
    "segmentation": _row(
        "segmentation",
        "photographs with masks of categories, patches in the joint space",
        "several windows a photograph",
        "Wang et al. 2024, arXiv:2312.01597 (SCLIP's protocol)",
        "Whether the model knows where things are, pixel by pixel.",
    ),
    "text_similarity": _row(
        "text_similarity",
        "pairs of texts with scores, or captions of the same images",
        "the text tower only",
        "Cer et al. 2017, arXiv:1708.00055",
        "How well text features stand for meaning.",
    ),
    "vocabulary_free": _row(
        "vocabulary_free",
        "images, captions of other images",
        "one search among the captions, and a few texts an image",
        "Conti et al. 2023, arXiv:2306.00917 (CaSED)",
        "Images to be named of which nobody can list the classes.",
    ),
    "worst_group": _row(
        "worst_group",
        "labelled images with a column of groups",
        _NONE,
        "Sagawa et al. 2020, arXiv:1911.08731",
        "Whether an accuracy hides a group for which the model fails.",
    ),
}
