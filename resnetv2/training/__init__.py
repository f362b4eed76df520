"""What a training run is made of: configuration, schedule, step, checkpoints and log.

``resnetv2.train`` puts them together.
"""
