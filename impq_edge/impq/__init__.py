"""IMPQ: the 2/4-bit allocation as a binary quadratic program under budgets, solved to proven optimality."""
