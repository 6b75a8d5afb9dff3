"""Training and evaluation: one loop for a model and for a supernet, and the loss on fixed windows."""
