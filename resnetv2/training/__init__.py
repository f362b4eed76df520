"""The parts of a training run. ``run`` puts them together; ``resnetv2.train`` has public names."""
