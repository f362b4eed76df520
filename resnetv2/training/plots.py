"""The curves of a training run as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from .metrics import EpochMetrics

# Okabe and Ito's palette: told apart with any colour vision, and by line style in print.
_TRAIN = {"color": "#0072B2", "linestyle": "--", "label": "training"}
_TEST = {"color": "#D55E00", "linestyle": "-", "label": "test"}


def plot_curves(history: Sequence[EpochMetrics], path: str | Path, title: str) -> None:
    """Draw loss and error against epochs, as in the paper's figures, and write ``path`` (PNG).

    Args:
        history: one entry an epoch, at least one.
        path: where the picture goes; its folder must exist.
        title: one line above both panels.
    """
    # Not pyplot: a library has no business with its global state or a window.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [entry.epoch for entry in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    marker = {"marker": "o", "markersize": 3} if len(epochs) <= 40 else {}
    losses.plot(epochs, [entry.train_loss for entry in history], **_TRAIN, **marker)
    losses.plot(epochs, [entry.test_loss for entry in history], **_TEST, **marker)
    losses.set(yscale="log", ylabel="loss (cross-entropy)")
    errors.plot(epochs, [100 * (1 - entry.train_accuracy) for entry in history], **_TRAIN, **marker)
    last = f"test, {100 * (1 - history[-1].test_accuracy):.2f} % in the end"
    errors.plot(
        epochs,
        [100 * (1 - entry.test_accuracy) for entry in history],
        **{**_TEST, "label": last},
        **marker,
    )
    errors.set(ylim=(0, None), ylabel="error (%)")
    for panel in (losses, errors):
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3, which="both")
    losses.legend(frameon=False)
    errors.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")
