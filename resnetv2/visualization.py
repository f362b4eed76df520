"""The plots of ResNet V2's experiments, for a notebook or a page.

from resnetv2.visualization import ResNetV2Visualizer
ResNetV2Visualizer().plot_curves(comparison)   # a cell's last line shows it
"""

from .studies.visualizer import Picture, ResNetV2Visualizer

__all__ = ["Picture", "ResNetV2Visualizer"]
