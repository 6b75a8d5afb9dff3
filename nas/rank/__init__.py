"""What a ranking of sharing configurations is worth: a ground truth, its own reliability, and estimators scored on it.

Owns the truth (a sample of a small space's configs, each trained alone several times over), the measures of agreement, and the
table of estimators. Nothing that a search does depends on it.
"""
