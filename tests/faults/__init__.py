"""What a search and the files that it reads must survive: kills, a server that is away, a full disk, and broken files.

`python -m tests.faults` tries many and writes `reports/faults.md`; `test_faults.py` tries a few.
"""
