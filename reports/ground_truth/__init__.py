"""A tabular benchmark: a sample of a small space's configs, each trained alone with several seeds, and evaluated as it goes.

Owns the benchmark's trainings, its table, the measures of agreement, and how reliable the benchmark itself is. `reports.ranking`
scores estimators on it, `reports.samplers` searches it.
"""
