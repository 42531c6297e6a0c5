"""Trackers: TensorBoard, Weights & Biases, Trackio and MLflow hear the lines of a run."""
