"""What happened: steps, totals, timelines, and their plots.  Written by the engine, read by everybody else."""
