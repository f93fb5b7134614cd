"""One step after another: requests in, outputs out.

opening ── runtime, capacity, config     everything an engine needs, found and opened, and who ends it
engine  ── intake                        a request becomes sequences
        ├─ pipeline                      the layers of a step
        ├─ sampling, row_faults          tokens from logits
        ├─ requests, results             tokens become outputs
        ├─ recovery                      an R-worker was lost
        ├─ guard                         an exception between any two lines
        └─ step_records                  what each step did, and when
"""
