"""What was measured, and the programs that measured it: `python -m reports.NAME` makes the page and the data in reports/NAME."""
