"""Real damage to real runs, with a table of what came out: python -m tests.chaos --trials N --seed S."""
