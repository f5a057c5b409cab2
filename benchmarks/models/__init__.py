"""The model suite: training steps of whole models, side by side."""
