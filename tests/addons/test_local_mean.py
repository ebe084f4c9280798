"""The teacher of the last epochs: the window's length, and the mean over it."""

import torch

from vlkit.addons.local_mean import LocalMean, window


def test_the_window_grows_from_two_epochs_to_nine() -> None:
    lengths = [window(epoch, 21) for epoch in range(21)]
    assert lengths == sorted(lengths) and (lengths[0], lengths[10], lengths[20]) == (2, 5, 9)  # 5.5 half way
    assert window(0, 1) == 2


def test_the_mean_is_over_the_window_and_of_values_as_they_were() -> None:
    value = torch.zeros(3)
    teacher = LocalMean({"value": value}, epochs=21)
    assert teacher.values() == {}
    for epoch in range(21):
        value.fill_(float(epoch))
        teacher.add(epoch)
        last = range(max(0, epoch + 1 - window(epoch, 21)), epoch + 1)
        assert torch.allclose(teacher.values()["value"], torch.full((3,), sum(last) / len(last)))
