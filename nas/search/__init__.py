"""A run from start to end: the trial that describes it, its folder, its stages, and the Optuna study that it owns."""
