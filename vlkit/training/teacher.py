"""A teacher that runs beside the student: its features of each batch, under its own preprocessing.

teacher = Teacher(load_encoder("open_clip:ViT-B-16/..."), student=encoder, rows=64)
batch = teacher(batch)                          # batch.extra["teacher_image"], ["teacher_text"]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.contracts import ImageTextBatch
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder


class Teacher:
    """Frozen; no part of the module that is trained.

    Images come as the student gets them, augmentation included, and are resized to the teacher's input; its mean and
    std are its own. Texts come as token ids, so both need the same tokenizer.

    Args:
        encoder: the teacher, on the student's device.
        student: whose batches it gets.
        rows: images or texts at a time.

    Raises:
        ConfigError: the tokenizers differ.
    """

    def __init__(self, encoder: DualEncoder, student: DualEncoder, rows: int) -> None:
        if encoder.tokenizer_id != student.tokenizer_id:
            raise ConfigError(
                f"loss.distillation: the teacher's tokenizer is {encoder.tokenizer_id}, the student's "
                f"{student.tokenizer_id}. A teacher beside the student reads the same token ids; take one with this "
                "tokenizer, or store the teacher's features in the shards (teacher_image.npy, teacher_text.npy)."
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.rows = rows

    @torch.no_grad()
    def __call__(self, batch: ImageTextBatch) -> ImageTextBatch:
        """The batch with the teacher's features and scale in `extra`."""
        device = self.encoder.device
        images = [self._images(part.to(device)) for part in batch.images.split(self.rows)]
        texts = [self.encoder.encode_text(self._fit(part.to(device))) for part in batch.tokens.split(self.rows)]
        found = {
            "teacher_image": torch.cat(images).float(),
            "teacher_text": torch.cat(texts).float(),
            "teacher_logit_scale": self.encoder.logit_scale().float(),
        }
        return batch._replace(extra={**batch.extra, **found})

    def _images(self, images: Tensor) -> Tensor:
        size = self.encoder.image_size
        if images.shape[-1] != size:
            resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
            images = resized.round_().clamp_(0, 255).to(torch.uint8)
        return self.encoder.encode_image(images)

    def _fit(self, tokens: Tensor) -> Tensor:
        """Texts longer than the teacher's context are cut and keep their end token, which is the largest id."""
        length = self.encoder.context_length
        if tokens.shape[1] <= length:
            return tokens
        cut = tokens[:, :length].clone()
        beyond = tokens[:, length:].amax(dim=1) > cut.amax(dim=1)  # the end token lies there
        cut[beyond, -1] = tokens[beyond].amax(dim=1)
        return cut
