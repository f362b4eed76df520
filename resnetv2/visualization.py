"""The plots of ResNet V2's experiments, for a notebook or a page.

from resnetv2.visualization import ResNetV2Visualizer
ResNetV2Visualizer().plot_lines({"V2": ([20, 50], [0.9, 0.8])}, "layers", "gradient norm")
"""

from .studies.visualizer import Picture, ResNetV2Visualizer

__all__ = ["Picture", "ResNetV2Visualizer"]
