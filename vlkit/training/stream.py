"""The batches of a run, from any step on: stages, numbers for patch dropout, features of a stored teacher."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

from vlkit.config import RunConfig
from vlkit.contracts import ImageTextBatch
from vlkit.data.loader import Loader
from vlkit.data.transforms import Preprocess
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.tokenizers import TextTokenizer
from vlkit.training.stages import Stage, add_draws, staged_batches
from vlkit.training.stored_teacher import StoredTeacher


class Stream:
    """The batches of one process.

    Args:
        loader: of batches as the model takes them at the end of the run.
        make_loader: one with another size and text length, and the same plan.
        stages: from `plan_stages`, checked.
        steps: of the whole run.
        teacher: whose features lie in the shards, where the run reads them.
    """

    def __init__(
        self,
        run: RunConfig,
        encoder: DualEncoder,
        loader: Loader,
        make_loader: Callable[[Preprocess, TextTokenizer], Loader],
        stages: list[Stage],
        steps: int,
        teacher: StoredTeacher | None = None,
    ) -> None:
        self._run, self._encoder, self._teacher = run, encoder, teacher
        self._loader, self._make_loader = loader, make_loader
        self._stages, self._steps = stages, steps
        self.loaders = [loader]  # whose reports together tell what could not be read

    def batches(self, step: int, skipped: int = 0) -> Generator[ImageTextBatch, None, None]:
        """The batches from a step on, without end; `skipped` of the data before it were left out."""
        plain = staged_batches(self._stages, self._loader_of, step, skipped, close=self._close)
        epoch_of = lambda i: self._loader.plan.position(i + skipped)[0]  # noqa: E731
        stream: Iterator[ImageTextBatch] = plain
        if self._run.model.patch_dropout:
            stream = add_draws(stream, seed=self._run.run.seed, start=step, until=self._unmasked(), epoch_of=epoch_of)
        if self._teacher is not None:
            stream = self._teacher.each(stream)
        try:
            yield from stream
        finally:
            plain.close()

    def _unmasked(self) -> int:
        """The step from which all patches are seen."""
        size = self._run.data.global_batch_size
        tail = self._run.model.patch_dropout_tail.in_steps(
            total=self._steps, steps_per_epoch=self._loader.num_batches, batch_size=size
        )
        return self._steps - tail

    def _loader_of(self, stage: Stage) -> Loader:
        if stage.image_size is None and stage.text_length is None:
            return self._loader
        encoder = self._encoder
        preprocess = replace(encoder.preprocess, size=stage.image_size or encoder.preprocess.size)
        tokenize = encoder.tokenize
        if stage.text_length is not None:
            tokenize = TextTokenizer(
                tokenize.tokenizer_id, stage.text_length, full_context=tokenize.full_context, folder=tokenize.folder
            )
        made = self._make_loader(preprocess, tokenize)
        self.loaders.append(made)
        return made

    def _close(self, loader: Loader) -> None:
        if loader is not self._loader:
            loader.close()
