"""Long trials of what a training run survives: kills, damage, hostile files, bad data, full disks, many steps.

Each function makes a number of trials in a folder, raises AssertionError for the first that goes wrong, and returns
the counts that the result file shows. `python -m soak` runs all of them at full size, tests/test_soak.py in short.
"""
