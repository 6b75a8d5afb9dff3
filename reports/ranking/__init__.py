"""Estimators of a config's loss, scored on the tabular benchmark: byte counts, short trainings, predictors, supernets."""
