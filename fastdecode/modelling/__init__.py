"""How long things take: the performance model, calibrations of machines, the scheduler in virtual time."""
