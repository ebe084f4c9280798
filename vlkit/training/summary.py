"""Pictures and a page of a run, made from its metrics.jsonl: loss.png while it runs, summary.html at its end."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit.models.saved import read_json
from vlkit.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
Curves = dict[str, list[tuple[int, float]]]  # name -> (step, value)

# As many as there are colours; more names leave no room for the picture. summary.html has the last value of all.
MOST_CURVES = 10

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title>
<style>body{font:15px sans-serif;max-width:900px;margin:2em auto;padding:0 1em}
img{max-width:100%;margin:.5em 0}td,th{text-align:left;padding:.15em 1.2em .15em 0}</style></head><body>
<h1>{{ name }}</h1>
<table>{% for key, value in rows %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% for title, picture in pictures %}<h2>{{ title }}</h2>
<img alt="{{ title }} over steps" src="data:image/png;base64,{{ picture }}">
{% endfor %}<h2>settings</h2><pre>{{ settings }}</pre></body></html>
"""


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draw the loss over steps, and the evaluations below it where there are any."""
    lines = list(read_metrics(metrics))
    panels = [("loss (nats)", {"": series(lines, "loss")}), ("fraction", most_telling(evaluations(lines)))]
    _draw([panel for panel in panels if panel[1]]).savefig(picture, dpi=110)


def write_summary(run: Path) -> Path:
    """Write summary.html, with its pictures inside, into a run folder that has metrics.jsonl and config.json."""
    import json

    from jinja2 import Environment

    lines = list(read_metrics(run / "metrics.jsonl"))
    pictures = [(title, _as_png(curves)) for title, curves in _pictures(lines) if any(curves.values())]
    page = Environment(autoescape=True).from_string(_PAGE)
    settings = json.dumps(read_json(run / "config.json"), indent=2, ensure_ascii=False)
    text = page.render(name=run.name, rows=_rows(lines), pictures=pictures, settings=settings)
    (run / "summary.html").write_text(text, encoding="utf-8")
    return run / "summary.html"


def series(lines: Lines, key: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has the key."""
    return [(line["step"], line[key]) for line in lines if key in line]


def evaluations(lines: Lines) -> Curves:
    """(step, value) of every metric that was evaluated."""
    curves: Curves = {}
    for line in lines:
        for name, value in line.get("eval", {}).items():
            curves.setdefault(name, []).append((line["step"], value))
    return curves


def most_telling(curves: Curves, most: int = MOST_CURVES) -> Curves:
    """As many curves as one picture can name: the first of each evaluation, then the second of each, and so on."""
    rank_in: Counter[str] = Counter()
    ranks = {}
    for name in curves:
        group = name.rpartition("/")[0]
        ranks[name] = rank_in[group]
        rank_in[group] += 1
    chosen = sorted(curves, key=lambda name: ranks[name])[:most]
    return {name: curves[name] for name in curves if name in chosen}


def _pictures(lines: Lines) -> list[tuple[str, Curves]]:
    temperature = [(step, 1 / scale) for step, scale in series(lines, "logit_scale")]
    norms = ("grad_norm", "update_norm")
    return [
        ("loss", {"": series(lines, "loss")}),
        ("learning rate", {"": series(lines, "lr")}),
        ("temperature", {"": temperature}),
        ("evaluations", most_telling(evaluations(lines))),
        ("contrastive accuracy in the batch", {"": series(lines, "contrastive_accuracy")}),
        ("norms", {name: series(lines, name) for name in norms if series(lines, name)}),
        ("images per second", {"": series(lines, "samples_per_second")}),
    ]


def _rows(lines: Lines) -> list[tuple[str, str]]:
    if not lines:
        return [("steps", "0")]
    last, evaluated = lines[-1], [line for line in lines if "eval" in line]
    waiting = sum(line["data_wait"] for line in lines) / len(lines)
    rows = [(key, f"{last[key]:.6g}") for key in ("step", "samples", "epoch", "seconds", "loss", "lr")]
    rows += [("temperature", f"{1 / last['logit_scale']:.4g}"), ("waiting for data", f"{waiting:.1%}")]
    rows += [(key, f"{last[key]:.4g}") for key in ("mfu", "tflops", "peak_memory") if key in last]
    # Evaluations have their own cadence each.
    latest = {name: value for line in evaluated for name, value in line["eval"].items()}
    return rows + [(name, f"{value:.4f}") for name, value in latest.items()]


def _as_png(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    written = io.BytesIO()
    _draw([("", curves)]).savefig(written, format="png", dpi=100)
    return base64.b64encode(written.getvalue()).decode()


def _draw(panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[int, float]]]]]) -> "Figure":
    """One panel below the other; names of curves that are not empty get a legend."""
    # Figure instead of pyplot: no window system is asked, no global state is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, curves) in zip(axes, panels, strict=True):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) < 30 else ""
            axis.plot(steps, values, linewidth=1, marker=marker, markersize=3, label=name or None)
        if any(curves):
            axis.legend(fontsize="small", loc="upper left")  # to find the best place takes seconds in a long run
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return figure
