"""What `make bench` measures: each module prints one report, and can be run alone."""
