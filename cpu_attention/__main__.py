"""``python -m cpu_attention --bind ADDRESS``: an R-worker on a machine that has no torch."""

from cpu_attention.process import main

raise SystemExit(main())
