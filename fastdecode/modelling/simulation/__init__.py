"""The engine's scheduler in virtual time.

simulator ── workload   requests: how long, when they come
          └─ cost       how long a step takes: a calibration, or the papers' machines
latency: what came of it, in the field's terms
"""
