"""Credit to a better policy: packing, the models, the loss, the optimiser's steps, checkpoints."""
