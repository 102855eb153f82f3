"""The study: every way of choosing bits, on the same games, judged on text that none of them saw."""
