"""OGEN: its network's identities, the parts of its loss, and that it leaves nothing behind but words."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.class_names import parse_class
from vlkit.addons.class_weights.coop import CoOp
from vlkit.addons.class_weights.kgcoop import KgCoOp
from vlkit.addons.class_weights.ogen import GENERATOR, Ogen, class_statistics, generate, nearest, wanted
from vlkit.addons.prompt_fit import parameter
from vlkit.errors import ConfigError

NAMES = ["dog", "black cat", "boat", "tree", "car"]


def network(dim: int = 8) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(dim, dim + 1, generator=random) for name in GENERATOR}


def test_the_network_in_a_loop_over_heads() -> None:
    found, random = network(), torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(2, n, 8, generator=random) for n in (1, 3, 3))
    made = generate(found, query, keys, values, None)
    for b in range(2):
        q, k, v = (
            part @ found[name][:, :-1].T + found[name][:, -1]
            for name, part in (("queries", query[b]), ("keys", keys[b]), ("values", values[b]))
        )
        heads = []
        for head in range(4):
            cut = slice(2 * head, 2 * head + 2)
            weights = torch.stack([q[0, cut] @ k[j, cut] / 2**0.5 for j in range(3)]).softmax(0)
            heads.append(sum(weights[j] * v[j, cut] for j in range(3)))
        mixed = found["out"][:, :-1] @ torch.cat(heads) + found["out"][:, -1]  # type: ignore[arg-type]
        inner = F.relu(found["up"][:, :-1] @ query[b, 0] + found["up"][:, -1])
        whole = found["down"][:, :-1] @ inner + found["down"][:, -1] + mixed
        assert torch.allclose(made[b, 0], whole / whole.norm(), atol=1e-5)
    assert torch.allclose(made.norm(dim=-1), torch.ones(2, 1))


def test_with_one_key_the_attention_does_not_see_the_query() -> None:
    found = network() | {"up": torch.zeros(8, 9), "down": torch.zeros(8, 9)}
    key, value = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    one, other = (generate(found, torch.randn(1, 2, 8), key, value, None) for _ in range(2))
    assert torch.allclose(one, other, atol=1e-6)


def test_neighbours_and_unknown_names() -> None:
    means = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0], [0.1, 0.9]])
    assert nearest(means).tolist()[0] == [1, 4, 2]
    names = torch.eye(2)[[0, 1, 1]]
    far = wanted(torch.tensor([[1.0, 0.1]]), torch.tensor([7]), names, torch.tensor([7, 3, 4]))
    assert sorted(far[0].tolist()) == [1, 2]  # not itself
    images, labels = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])
    mean, deviation = class_statistics(images, labels, 2)
    assert mean.flatten().tolist() == [2.0, 5.0] and deviation.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("learner", ["coop", "kgcoop"])
def test_the_learners_loss_alone_is_the_learner_step_by_step(small: Any, labelled: Any, learner: Any) -> None:
    given = labelled(NAMES, noise=0.3)
    common = {"words": "a photo of a", "epochs": 3, "lr": 0.1, "batch_size": 4}
    plain = (CoOp if learner == "coop" else KgCoOp)(**common).fit(given, small())  # type: ignore[arg-type]
    alone = Ogen(**common, learner=learner, parts="learner").fit(given, small())  # type: ignore[arg-type]
    whole = Ogen(**common, learner=learner).fit(given, small())  # type: ignore[arg-type]
    assert torch.equal(alone.vectors, plain.vectors)  # type: ignore[arg-type]
    assert not torch.allclose(whole.vectors, plain.vectors, atol=1e-4)  # type: ignore[arg-type]
    assert set(whole.state().tensors) == {"vectors"}


def test_the_parts_of_the_loss_by_hand(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES), small()
    fitted = Ogen(unknown="bus|zebra", epochs=5, batch_size=20, distill=0.0).fit(given, source)
    assert fitted.trained_with == ("bus", "zebra")
    task = fitted.task(given, source, fitted.examples(given))
    found = {name: parameter(start) for name, start in fitted.start(task).items()}
    loss, rows = fitted.objective(task, found), torch.tensor([0, 9, 18])
    values = [loss(rows).item() for _ in range(2)]  # the first of five epochs, then the others
    random = torch.Generator().manual_seed(task.seed + 2)
    weights = task.text.features(found["vectors"])
    names = fitted.prompted([parse_class("bus"), parse_class("zebra")], source).features(found["vectors"])
    means, deviations = class_statistics(task.images, task.labels, 5)
    images, labels, scale = task.images[rows], task.labels[rows], source.logit_scale
    near = nearest(means)[labels]
    for value, later in zip(values, (False, True), strict=True):
        noise = torch.rand(32, generator=random)
        around = means[near] + noise * deviations[near]
        own = generate(found, weights[labels][:, None], weights[near], around, random)[:, 0]
        others = generate(found, weights[near], weights[labels][:, None], images[:, None], random)
        far = (weights[labels] @ names.T).topk(2).indices
        new = generate(found, names[far], weights[labels][:, None], images[:, None], random)
        total = 32 * scale / 100 * (((own - images) ** 2).mean() + ((others - around) ** 2).mean())
        if later:
            total += F.cross_entropy(scale * images @ weights.T, labels) / 4
            total += F.cross_entropy(scale * own @ weights.T, labels) / 4
            for j in range(3):
                total += F.cross_entropy(scale * others[:, j] @ weights.T, near[:, j]) / 12
            for j in range(2):
                total += F.cross_entropy(scale * new[:, j] @ names.T, far[:, j]) / 6
        assert value == pytest.approx(total.item(), rel=1e-4), later


def test_the_student_is_held_near_the_mean_of_its_past(small: Any, labelled: Any) -> None:
    given, source = labelled(NAMES), small()
    plain = Ogen(unknown="bus|zebra", epochs=5, batch_size=10, distill=0.0).fit(given, source)  # two steps an epoch
    task = plain.task(given, source, plain.examples(given))
    found = {name: parameter(start) for name, start in plain.start(task).items()}
    with_teacher, without = (replace(plain, distill=weight).objective(task, found) for weight in (3.0, 0.0))
    random, drawn = torch.Generator().manual_seed(4), torch.Generator().manual_seed(task.seed + 2)
    rows, more = torch.tensor([0, 9, 18]), []
    past: list[dict[str, torch.Tensor]] = []
    means, deviations = class_statistics(task.images, task.labels, 5)
    images, near = task.images[rows], nearest(means)[task.labels[rows]]
    names = plain.prompted([parse_class("bus"), parse_class("zebra")], source)

    def made(values: Any, around: torch.Tensor, far: torch.Tensor, random: Any) -> list[torch.Tensor]:
        base, new = (text.features(values["vectors"]) for text in (task.text, names))
        own = base[task.labels[rows]][:, None]
        queries = (own, base[near], around), (base[near], own, images[:, None]), (new[far], own, images[:, None])
        return [generate(values, *one, random) for one in queries]

    for step in range(7):
        more.append((with_teacher(rows) - without(rows)).item())
        around = means[near] + torch.rand(32, generator=drawn) * deviations[near]
        base, new = (text.features(found["vectors"]) for text in (task.text, names))
        far = (base[task.labels[rows]] @ new.T).topk(2).indices
        student = made(found, around, far, drawn)
        if step == 6:  # three epochs are over, all of which are in the window
            teacher = {name: torch.stack([one[name] for one in past]).mean(0) for name in found}
            pairs = zip(student, made(teacher, around, far, None), strict=True)
            wished = sum(((one - other) ** 2).mean().item() for one, other in pairs)
            assert more[-1] == pytest.approx(3 * 32 * task.scale / 100 * wished, rel=1e-3)
        with torch.no_grad():  # as if trained
            for value in found.values():
                value += 0.05 * torch.randn(value.shape, generator=random)
        if step % 2:
            past.append({name: value.detach().clone() for name, value in found.items()})
    assert more[:2] == pytest.approx([0.0, 0.0], abs=1e-5) and min(more[2:]) > 1e-4  # at first there is no teacher


def test_distillation_changes_what_is_learned(small: Any, labelled: Any) -> None:
    given = labelled(NAMES, noise=0.3)
    common = {"epochs": 5, "lr": 0.1, "batch_size": 10}
    taught, free = (Ogen(**common, distill=weight).fit(given, small()) for weight in (1.0, 0.0))  # type: ignore[arg-type]
    assert not torch.allclose(taught.vectors, free.vectors, atol=1e-4)  # type: ignore[arg-type]


def test_bad_input(small: Any, labelled: Any) -> None:
    with pytest.raises(ConfigError, match="twice"):
        Ogen(unknown="dog").fit(labelled(NAMES), small())
    with pytest.raises(ConfigError, match="neighbours"):
        Ogen().fit(labelled(["dog"]), small())
