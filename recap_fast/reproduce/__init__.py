"""The paper's experiments at a size that a laptop runs, each behind one command."""
