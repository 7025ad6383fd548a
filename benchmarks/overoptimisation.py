"""Draws the over-optimisation of a reward model (2210.10760), for `algorithms.py`.

Curves are penalty -> seed -> name in `CURVES` -> values by iteration.
"""

import statistics
from pathlib import Path

Curves = dict[str, dict[int, dict[str, list[float]]]]

CURVES = {"gold": "reward/gold", "proxy": "reward/score", "kl": "kl/k1"}  # name -> metric
TITLES = {"gold": "gold score (the truth)", "proxy": "proxy: the noisy reward model's score"}
COLOURS = ("#c1272d", "#0b5fa5")
SMOOTHED = 5  # iterations averaged per point
LAST = 10  # iterations averaged for the final value


def smoothed(values: list[float]) -> list[float]:
    """Centered moving average over SMOOTHED iterations, fewer at the ends."""
    half = SMOOTHED // 2
    return [statistics.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw(curves: Curves, path: Path) -> None:
    """Draws gold and proxy by iteration: thin lines are seeds, bold lines their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams["svg.hashsalt"] = "jaxrlhf"  # the same curves give the same file
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for panel, (name, title) in zip(panels, TITLES.items()):
        for (penalty, by_seed), colour in zip(curves.items(), COLOURS):
            lines = [smoothed(curve[name]) for curve in by_seed.values()]
            for line in lines:
                panel.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.7, alpha=0.45)
            mean = [statistics.mean(at) for at in zip(*lines)]
            panel.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2.2, label=penalty)
        panel.set(title=title, xlabel="PPO iteration")
        panel.title.set_size(9)
    panels[0].set_ylim(0, 1)
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def spread(values: list[float], digits: int) -> str:
    """Text of the mean (min to max)."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def summary(curves: Curves) -> str:
    """The best and the final value of each curve, per penalty."""
    lines = []
    for penalty, by_seed in curves.items():
        for name in CURVES:
            best = [max(smoothed(curve[name])) for curve in by_seed.values()]
            last = [statistics.mean(curve[name][-LAST:]) for curve in by_seed.values()]
            lines.append(f"{penalty}: {name} at most {spread(best, 3)}, last {LAST} iterations {spread(last, 3)}")
    return "\n".join(lines) + "\n"
