"""What runs next, and where: pure, so that the engine and the simulator drive the same objects.

scheduler ─┬─ waiting        who is first
           ├─ load_control   may it start now? ─┬─ kv_credits   does its KV fit, on which R-worker? ─┐
           │                                    ├─ load         the load in the steps to come  ◄─────┘
           │                                    └─ placement    on the device, or on R-workers?
           ├─ predictor      how long will it be
           └─ lane           sequences with steps of their own, as columns
"""
