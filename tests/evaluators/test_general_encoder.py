"""The committed encoder is the one that its card describes."""

import json
from pathlib import Path

import pytest

from eval.general_encoder import MAX_BYTES, folder_of, measure_encoder, model_card, weights_size
from vlkit.config import load_run


def test_the_folder_holds_what_its_card_says(general_encoder: Path) -> None:
    figures = json.loads((general_encoder / "figures.json").read_text())
    assert weights_size(general_encoder) <= MAX_BYTES
    assert (general_encoder / "README.md").read_text() == model_card(figures, weights_size(general_encoder))
    for name, metrics in figures.items():
        for metric, (value, low, high) in metrics.items():
            assert low <= value <= high, (name, metric)
    # What methods are measured on must know something.
    assert figures["flickr8k dev"]["text_to_image/recall@10"][0] > 0.2
    assert figures["caltech101"]["accuracy@1"][1] > 0.05
    assert figures["cifar10_test"]["accuracy@1"][1] > 0.2


def test_a_training_with_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    run, same, other = (load_run("general_small", changes) for changes in ([], [], ["optim.matrix_lr=5e-3"]))
    assert folder_of(run, tmp_path) == folder_of(same, tmp_path) != folder_of(other, tmp_path)


def test_it_gives_what_the_methods_need(general_encoder: Path) -> None:
    from vlkit.models.load import load_encoder

    encoder = load_encoder(f"local-dir:{general_encoder}")
    assert {"patches", "vision_tower", "text_tower"} <= encoder.gives
    assert len(encoder.vision_tower.blocks) >= 4 and encoder.vision_tower.grid == (8, 8)


@pytest.mark.slow
def test_its_figures_come_out_again(general_encoder: Path, vlkit_data: Path) -> None:
    figures = json.loads((general_encoder / "figures.json").read_text())
    for name, metrics in measure_encoder(f"local-dir:{general_encoder}", vlkit_data).items():
        for metric, (value, _, _) in metrics.items():
            assert value == pytest.approx(figures[name][metric][0], abs=0.005), (name, metric)
