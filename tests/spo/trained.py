"""What a run has trained."""

from pathlib import Path

from safetensors.torch import load_file

from spo.learn.checkpoint import latest_checkpoint


def trained_weights(out, part="policy"):
    """Name -> tensor in the precision of training, of the newest checkpoint's policy or critic."""
    checkpoint = latest_checkpoint(Path(out))
    exact = checkpoint / "weights.safetensors"
    wide = part == "policy" and exact.exists()
    return load_file(exact if wide else checkpoint / part / "model.safetensors")
