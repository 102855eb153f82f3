"""SPQE: how much each block suffers at 2 bit, and how blocks interact, from losses of coalitions."""
