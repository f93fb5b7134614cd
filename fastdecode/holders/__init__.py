"""The R-workers of a run: started or found, asked as one pool, lost, and back again.

launch, processes          ─► channels to R-workers: threads, processes of this machine, addresses
launch_mpi, mpi_roles      ─► the same under mpirun, where each rank has a role
rpool                      ─► rows out, o back, who is lost
rejoin, patience           ─► who comes back, and how long one that does not answer is waited for
"""
