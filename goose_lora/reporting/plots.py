"""Pictures of runs as PNG: curves of one or several, and the frontier of one."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goose_lora.reporting.findings import Rows, rollouts_in, rollouts_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]


def plot_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the curves of one run over PPO steps to ``path``, as one PNG."""
    Path(path).write_bytes(curves({"": metrics}))


def curves(runs: Mapping[str, Rows], *, over: str = "optimizer step") -> bytes:
    """Draw score, KL, critic loss and reply length of each run.

    Where no run has a critic, entropy takes the place of its loss. A single run also has its
    evaluations while training.

    Args:
        runs: logged rows by the run's name.
        over: ``optimizer step``, or ``rollout``, which means the same in runs that train on a
            rollout in different numbers of steps.
    """
    # Imported late: matplotlib takes a second, and most commands draw nothing
    from matplotlib.figure import Figure

    # Metric, its counterpart on held-out prompts, and title of each panel
    third = ("policy/entropy", "", "entropy (nats a token)")
    if any("loss/value" in row for rows in runs.values() for row in rows):
        third = ("loss/value", "", "critic loss")
    panels = [
        ("objective/score", "eval_score", "score (reward model, in SFT standard deviations)"),
        ("objective/kl", "eval_kl", "KL to the reference (nats a reply)"),
        third,
        ("rollout/response_tokens", "eval_response_tokens", "reply length (tokens)"),
    ]

    # An ensemble of reward models has one more
    columns = 2
    if any("objective/disagreement" in row for rows in runs.values() for row in rows):
        panels.append(("objective/disagreement", "", "disagreement of the reward models (their spread)"))
        columns = 3

    figure = Figure(figsize=(5 * columns, 6), layout="constrained")
    lines = []
    axes = list(figure.subplots(2, columns).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, evaluated, title) in zip(axes, panels, strict=False):
        lines = [
            axis.plot(*_columns(_points(rows, name, over)), marker=".", color=f"C{index}")[0]
            for index, rows in enumerate(runs.values())
        ]
        # With several runs, their evaluations would be lost among their curves
        held_out: Points = []
        if len(runs) == 1:
            held_out = _points(next(iter(runs.values())), evaluated, over)
        if held_out:
            axis.plot(*_columns(held_out), marker="s", color="C1", label="held-out prompts")
            axis.legend()
        axis.set(title=title, xlabel=over)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)

    # One legend for all panels; a dollar sign in a name would begin a formula
    if len(runs) > 1:
        figure.legend(
            lines,
            [name.replace("$", r"\$") for name in runs],
            loc="outside lower center",
            ncols=min(len(runs), 3),
        )
    return _png(figure)


def frontier(metrics: Rows) -> bytes:
    """Draw score against KL, a point a logged rollout, coloured by its step.

    It shows what score was bought with what distance (Gao et al. 2022, arXiv:2210.10760).
    """
    from matplotlib.figure import Figure

    points = [
        (row["objective/kl"], row["objective/score"], row["step"])
        for row in rollouts_of(metrics)
        if "objective/kl" in row
    ]
    # A line joins the points in the order of training, and colours tell its direction
    kl, scores, steps = zip(*points, strict=True) if points else ((), (), ())
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(kl, scores, color="0.8", zorder=1)
    figure.colorbar(axis.scatter(kl, scores, c=steps, zorder=2), label="optimizer step")
    axis.set(xlabel="KL to the reference (nats a reply)", ylabel="score (in SFT standard deviations)")
    axis.grid(alpha=0.3)
    return _png(figure)


def _points(rows: Rows, name: str, over: str) -> Points:
    """Return the finite values of a metric, each with its place on the axis ``over``."""
    if over == "rollout":
        # A row is the mean of the rollouts since the last row; other rows count none
        places = list(accumulate(rollouts_in(row) * ("objective/score" in row) for row in rows))
    else:
        places = [row["step"] for row in rows]
    return [
        (place, row[name])
        for place, row in zip(places, rows, strict=True)
        if name in row and abs(row[name]) < inf
    ]


def _columns(points: Points) -> tuple[Sequence[float], Sequence[float]]:
    return [place for place, _ in points], [value for _, value in points]


def _png(figure: "Figure") -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
