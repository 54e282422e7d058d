"""What `python -m lean_attention` runs. The library imports none of it."""
