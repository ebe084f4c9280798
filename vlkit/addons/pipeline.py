"""Add-ons in their one order, fitted one after the other, applied to images and texts.

    pipeline = Pipeline([Mean(), TipAdapter(alpha=2.0)])     # any order; it puts them into its own
    pipeline = pipeline.fit(reference, source)               # what an add-on sees has gone through those before it
    pipeline.classifier(class_names, source).logits(images)  # (n,C)
    pipeline.retrieval(images, texts, source).scores("text_to_image")
    PLAIN                                                    # the pipeline of no add-ons

Order: edit_image, edit, weights, map, score, term, bias, merge. Everything is logits = logit_scale x score.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlkit.addons.adapted import AdaptedClassifier, AdaptedRetrieval, through_maps
from vlkit.addons.base import (
    SLOTS,
    AddOn,
    ClassWeighting,
    FeatureMap,
    GalleryBias,
    InputEdit,
    Merge,
    Need,
    PairScoring,
    StreamingTerm,
    Task,
    Term,
    TowerEdit,
)
from vlkit.addons.belonging import CHANGING, check_before, require_same_classes
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES, load_templates, template_weights
from vlkit.addons.exchange import ClassWeights, Vectors, Weights, no_vectors
from vlkit.addons.passes import Edit, EditedSource
from vlkit.addons.reference import Part, Reference, Stream, needed_for
from vlkit.addons.views import ViewRecipe
from vlkit.addons.worded import WordedEdit
from vlkit.contracts import Progress
from vlkit.errors import ConfigError
from vlkit.features.source import FeatureSource

_ONE_OF = {
    "pair_scores": "each takes the place of the cosine, so only one of them would count",
    "gallery_bias": "each is fitted to the scores without the other, so together they correct twice",
}


@dataclass(frozen=True)
class Pipeline:
    """Add-ons that go together.

    Attributes:
        addons: in the order of application, whatever order they are given in.
    """

    addons: Sequence[AddOn] = ()

    def __post_init__(self) -> None:
        """Put into order, and check.

        Raises:
            ConfigError: add-ons that do not go together, with the reason.
        """
        # Stable: two of one slot keep the order in which they are given.
        in_order = tuple(sorted(self.addons, key=lambda addon: SLOTS.index(addon.slot)))
        object.__setattr__(self, "addons", in_order)
        self._check_pairs()
        check_before(self.addons)

    @property
    def tower_edits(self) -> tuple[TowerEdit, ...]:
        """Those that change towers."""
        return tuple(addon for addon in self.addons if isinstance(addon, TowerEdit))

    @property
    def weightings(self) -> tuple[ClassWeighting, ...]:
        """Those that make class weights: several only with a merge."""
        return tuple(addon for addon in self.addons if isinstance(addon, ClassWeighting))

    @property
    def maps(self) -> tuple[FeatureMap, ...]:
        """Those that change features, in order."""
        return tuple(addon for addon in self.addons if isinstance(addon, FeatureMap))

    @property
    def scoring(self) -> PairScoring | None:
        """What takes the place of the cosine."""
        return next((addon for addon in self.addons if isinstance(addon, PairScoring)), None)

    @property
    def terms(self) -> tuple[Term | StreamingTerm, ...]:
        """Those that add to logits, in order."""
        return tuple(addon for addon in self.addons if isinstance(addon, Term | StreamingTerm))

    @property
    def bias(self) -> GalleryBias | None:
        """What is subtracted from the scores of gallery items."""
        return next((addon for addon in self.addons if isinstance(addon, GalleryBias)), None)

    @property
    def merge(self) -> Merge | None:
        """What joins several matrices of scores."""
        return next((addon for addon in self.addons if isinstance(addon, Merge)), None)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Those that change pixels or towers."""
        inputs = tuple(addon for addon in self.addons if isinstance(addon, InputEdit))
        return (*inputs, *self.tower_edits)

    @property
    def needs(self) -> frozenset[Need]:
        """What any of them needs."""
        return frozenset().union(*(addon.needs for addon in self.addons))

    @property
    def transductive(self) -> bool:
        """Whether one of them sees the test images."""
        return any(addon.transductive for addon in self.addons)

    @property
    def streaming(self) -> bool:
        """Whether the order of the images matters."""
        return any(isinstance(addon, StreamingTerm) for addon in self.addons)

    @property
    def views(self) -> ViewRecipe | None:
        """Views its add-ons want of the images they are used on."""
        return next((addon.views for addon in self.addons if addon.views is not None), None)

    @property
    def local(self) -> bool:
        """Whether it needs patches of the images it is used on."""
        return bool(self.needs & {"patches", "patch_tokens"})

    @property
    def fitted(self) -> bool:
        """Whether every add-on is."""
        return all(addon.fitted is not None for addon in self.addons)

    @property
    def changing(self) -> tuple[str, ...]:
        """Keys of the add-ons that change features."""
        return tuple(addon.key for addon in self.addons if addon.slot in CHANGING)

    def describe(self) -> list[dict[str, object]]:
        """What it is, for a result: name, slot, settings, needs, what it was fitted on."""
        return [
            {
                "name": addon.name,
                "slot": addon.slot,
                "settings": addon.settings(),
                "needs": sorted(addon.needs | (addon.uses & set(addon.fitted.seen if addon.fitted else ()))),
                "fitted_on": {} if addon.fitted is None else dict(addon.fitted.seen),
                "transductive": addon.transductive,
            }
            for addon in self.addons
        ]

    def source(self, plain: FeatureSource) -> FeatureSource:
        """The model under the edits of this pipeline; the model itself where it has none."""
        return EditedSource(plain, self.edits) if self.edits else plain

    def fit(
        self,
        reference: Reference,
        source: FeatureSource,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        progress: Progress | None = None,
    ) -> "Pipeline":
        """Fit what is not fitted yet, in order; each add-on sees the reference as those before it leave it.

        Args:
            reference: of any split but the test split.
            source: the model, without edits.
            templates: of the zero-shot weights that `reference.weights` and `reference.logits` start from.
            progress: called with (done, total) of each add-on that takes long.

        Raises:
            ConfigError: something that an add-on needs is missing; or add-ons that do not go together.
        """
        done: list[AddOn] = []
        for addon in self.addons:
            if addon.fitted is None:
                # Of several class weightings that only a merge makes one, the first stands for them meanwhile.
                others = [one for one in done if isinstance(one, ClassWeighting)][1:]
                so_far = Pipeline([one for one in done if one not in others])
                seen = so_far._seen_by(addon, reference, source, templates)
                addon = addon.fit(seen, so_far.source(source), progress)
            done.append(addon)
        return Pipeline(done)

    def require_usable(self, source: FeatureSource, task: Task, class_names: Sequence[ClassName] = ()) -> None:
        """Refuse to be used where it does not belong.

        Raises:
            ConfigError: an add-on that is not fitted, is for another task, or was fitted with other classes.
            GalleryError: an add-on that was fitted for another encoder.
        """
        for addon in self.addons:
            if task not in addon.tasks:
                raise ConfigError(f"{addon.name} is for {' and '.join(sorted(addon.tasks))}, not for {task}.")
            if addon.fitted is None:
                raise ConfigError(f"{addon.name} is not fitted. Call Pipeline.fit, or `vlkit adapt {addon.name}`.")
            addon.fitted.encoder.require_same(source.card.fingerprint, f"The add-on {addon.name}", "this encoder")
            if addon.fitted.task != task:
                raise ConfigError(f"{addon.name} was fitted for {addon.fitted.task}; fit it anew for {task}.")
            if class_names and not addon.any_classes:
                require_same_classes(addon, class_names)

    def class_weights(
        self,
        class_names: Sequence[ClassName],
        source: FeatureSource,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        progress: Progress | None = None,
    ) -> tuple[Weights, ...]:
        """Of each class weighting, before feature maps; those of the templates where there is none."""
        edited = self.source(source)
        made = tuple(addon.weights(class_names, edited) for addon in self.weightings)
        if made:
            return made
        chosen = load_templates(templates) if isinstance(templates, str) else tuple(templates)
        # Prompts inside the text tower stand in place of the words of one template.
        chosen = next(((edit.template,) for edit in self.tower_edits if isinstance(edit, WordedEdit)), chosen)
        return (template_weights(edited, [item.names for item in class_names], chosen, progress),)

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """Both sides through all feature maps, views of the images too."""
        return through_maps(self.maps, images, texts)

    def classifier(
        self,
        class_names: Sequence[ClassName],
        source: FeatureSource,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        progress: Progress | None = None,
    ) -> AdaptedClassifier:
        """What makes logits of image vectors.

        Args:
            class_names: C classes.
            source: the model, without edits.
            templates: of the weights, where no add-on makes them.
            progress: called with (done, total) prompts.

        Raises:
            ConfigError, GalleryError: see `require_usable`.
        """
        self.require_usable(source, "classification", class_names)
        weights = self.class_weights(class_names, source, templates, progress)
        return AdaptedClassifier(
            class_names=tuple(item.shown for item in class_names),
            weights=weights,
            maps=self.maps,
            scoring=self.scoring,
            terms=self.terms,
            bias=self.bias,
            merge=self.merge,
            logit_scale=source.logit_scale,
            logit_bias=source.logit_bias or 0.0,
            family=source.family,
        )

    def retrieval(self, images: Vectors, texts: Vectors, source: FeatureSource) -> AdaptedRetrieval:
        """What scores images and texts against each other, in either direction.

        Raises:
            ConfigError, GalleryError: see `require_usable`.
        """
        self.require_usable(source, "retrieval")
        images, texts = self.map(images, texts)
        return AdaptedRetrieval(images, texts, self.scoring, self.bias)

    def _seen_by(
        self, addon: AddOn, reference: Reference, source: FeatureSource, templates: str | Sequence[str]
    ) -> Reference:
        """The reference as this pipeline, which holds the add-ons before it, leaves it."""
        changed: dict[str, object] = {}
        for name, part in reference.image_parts().items():
            if needed_for(name) in addon.needs | addon.uses:
                changed[name] = self._passed(name, part, addon, reference)
        seen = replace(reference, **changed, before=self.changing)  # type: ignore[arg-type]
        if seen.captions is not None:
            vectors = seen.captions.vectors
            if any("text" in edit.towers for edit in self.tower_edits):
                vectors = replace(vectors, pooled=self.source(source).embed_texts(seen.captions.texts))
            seen = replace(seen, captions=replace(seen.captions, vectors=vectors))
        seen = self._mapped(seen, source.embed_dim)
        if not seen.class_names or not (addon.needs | addon.uses) & {"class_names"}:
            return seen
        return self._with_logits(seen, source, templates)

    def _passed(self, name: str, part: Part | Stream, addon: AddOn, reference: Reference) -> Part | Stream:
        """A part's images under the edits so far, with the views the add-on wants to be fitted on.

        Behind a feature map that averages views (TTA), images without other views come in the same ones.
        """
        averaged = next((one.views for one in self.maps if one.views is not None), None)
        recipe = {"val": None, "stream": addon.views}.get(name, addon.fit_views) or averaged
        local = bool((addon.needs | addon.uses) & {"patches", "patch_tokens"})
        lacks_patches = local and part.vectors.patches is None and part.vectors.patch_tokens is None
        if not self.edits and recipe is None and not lacks_patches:
            return part
        if reference.passes is None or not part.records:
            raise ConfigError(
                f"{addon.name} wants the reference images once more (under edits, in views or with patches), but only "
                "their features are there. Give the reference with its records and `passes`."
            )
        read = reference.passes.read(part.records, self.edits, recipe)
        if len(read.kept) != len(part):
            raise ConfigError(f"{len(part) - len(read.kept)} reference images could not be read a second time.")
        if lacks_patches and read.vectors.patch_tokens is None:
            raise ConfigError(f"{addon.name} needs patches; make `Passes` with local=True.")
        return replace(part, vectors=read.vectors)

    def _mapped(self, reference: Reference, dim: int) -> Reference:
        """All parts through the feature maps."""
        if not self.maps:
            return reference
        parts: dict[str, object] = {
            name: replace(part, vectors=self.map(part.vectors, no_vectors("text", dim))[0])
            for name, part in reference.image_parts().items()
        }
        if reference.captions is not None:
            _, texts = self.map(no_vectors("image", dim), reference.captions.vectors)
            parts["captions"] = replace(reference.captions, vectors=texts)
        return replace(reference, **parts)  # type: ignore[arg-type]

    def _with_logits(self, reference: Reference, source: FeatureSource, templates: str | Sequence[str]) -> Reference:
        """With the class weights and the logits of this pipeline. Image vectors are mapped already."""
        classifier = self.classifier(reference.class_names, source, templates)
        dim = source.embed_dim
        first = classifier.weights[0]
        mapped: tuple[Weights, ...] = tuple(
            replace(one, vectors=self.map(no_vectors("image", dim), Vectors("text", one.vectors))[1].pooled)
            if isinstance(one, ClassWeights)
            else one
            for one in classifier.weights
        )
        of_mapped = replace(classifier, weights=mapped, maps=())
        weights = mapped[0] if isinstance(first, ClassWeights) and isinstance(mapped[0], ClassWeights) else None
        return replace(reference, weights=weights, logits=of_mapped.logits)

    def _check_pairs(self) -> None:
        for slot, reason in _ONE_OF.items():
            chosen = [addon.name for addon in self.addons if addon.slot == slot]
            if len(chosen) > 1:
                raise ConfigError(f"{' and '.join(chosen)} do not go together: {reason}. Choose one.")
        switches = [addon.name for addon in self.tower_edits if "patches" in addon.needs]
        if len(switches) > 1:
            raise ConfigError(
                f"{' and '.join(switches)} do not go together: each mixes the patches of the last block anew, so only "
                "the last would count. Choose one."
            )
        if len(self.weightings) > 1 and self.merge is None:
            names = " and ".join(addon.name for addon in self.weightings)
            raise ConfigError(f"{names} each make class weights; choose one, or add a merge that joins their scores.")
        merges = [addon.name for addon in self.addons if isinstance(addon, Merge)]
        if len(merges) > 1:
            raise ConfigError(f"{' and '.join(merges)} do not go together: after one merge nothing is left to merge.")
        if self.streaming and merges:
            raise ConfigError(f"{merges[0]} joins several scores, but a streaming add-on remembers one. Leave one out.")
        if self.scoring is not None and self.bias is not None:
            raise ConfigError(
                f"{self.bias.name} is estimated from inner products with its bank, but {self.scoring.name} scores "
                "otherwise. Leave one out."
            )
        if len({addon.views for addon in self.addons if addon.views is not None}) > 1:
            raise ConfigError("Two add-ons want different views of the images. Leave one out.")
        learned_outside = [addon.name for addon in self.weightings if not addon.text_space]
        if learned_outside and self.maps:
            raise ConfigError(
                f"{learned_outside[0]} learned its weights on the features as they are, and "
                f"{self.maps[0].name} would change both. Leave one out."
            )


PLAIN = Pipeline()
