"""A checkpoint as laid out on the hub: what it holds, its weights, and the text it is tried on."""
