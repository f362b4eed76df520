"""The curves of a training run as a picture, and the class of all pictures."""

import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .metrics import EpochMetrics

# Okabe and Ito's palette: told apart with any colour vision, and by line style in print.
_TRAIN = {"color": "#0072B2", "linestyle": "--", "label": "training"}
_TEST = {"color": "#D55E00", "linestyle": "-", "label": "test"}


class Picture(Figure):
    """A Figure that notebooks show without pyplot, its global state and its windows.

    caption: what is drawn, in a sentence; "" where the titles say it.
    """

    caption = ""

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self, dpi: int = 150) -> bytes:
        """The picture as the content of a PNG file."""
        file = io.BytesIO()
        self.savefig(file, dpi=dpi, format="png")
        return file.getvalue()


def draw_curves(history: Sequence[EpochMetrics], title: str) -> Picture:
    """Loss and error against epochs, as in the paper's figures.

    Args:
        history: one entry an epoch, at least one.
        title: one line above both panels.
    """
    epochs = [entry.epoch for entry in history]
    figure = Picture(figsize=(9, 3.6), layout="constrained")
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
    return figure
