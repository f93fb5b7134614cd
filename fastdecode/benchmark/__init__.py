"""``fastdecode bench``: this runtime and its peers on the same weights, prompts and lengths.

workload    requests, made or read                     engines     who serves them: fastdecode, hf, vllm, llamacpp
throughput  rounds over engines, a record per engine   sweep       a grid of such runs, resumable
latency     one batch, step by step                    wire        round trips per transport
serving     a server under load                        http_client requests to it, and when their tokens came
"""
