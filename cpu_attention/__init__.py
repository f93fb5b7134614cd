"""The R-Part: attention and the KV cache, on CPUs, beside the memory they read.  numpy in, numpy out.

Never imports torch: a CPU node needs this package and `transport` alone.
"""

from cpu_attention.errors import BadRequest, KVBudgetExceeded, MessageRefused, SequenceExists, UnknownSequence
from cpu_attention.kvstore import KVStore
from cpu_attention.layout import KV_DTYPES, LANES, NUMBER_DTYPES, AttentionRule, HeadFormat, KVLayout, LayerShape
from cpu_attention.machine import (
    NumaNode,
    available_cores,
    available_memory_bytes,
    cgroup_memory_limit_bytes,
    check_budget,
    cpu_name,
    default_kv_cache_bytes,
    format_bytes,
    format_cores,
    keep_to_cores,
    num_usable_cores,
    numa_nodes,
    parse_bytes,
    pin_thread,
    raise_file_limit,
    share_of_cores,
)
from cpu_attention.process import KERNELS, LISTENING, start_logging
from cpu_attention.process import add_arguments as add_process_arguments
from cpu_attention.process import run as run_process
from cpu_attention.roofs import measure_read_bandwidth
from cpu_attention.rworker import RWorker
from cpu_attention.serve import serve

__all__ = [
    "KERNELS",
    "KV_DTYPES",
    "LANES",
    "LISTENING",
    "NUMBER_DTYPES",
    "AttentionRule",
    "BadRequest",
    "HeadFormat",
    "KVBudgetExceeded",
    "KVLayout",
    "KVStore",
    "LayerShape",
    "MessageRefused",
    "NumaNode",
    "RWorker",
    "SequenceExists",
    "UnknownSequence",
    "add_process_arguments",
    "available_cores",
    "available_memory_bytes",
    "cgroup_memory_limit_bytes",
    "check_budget",
    "cpu_name",
    "default_kv_cache_bytes",
    "format_bytes",
    "format_cores",
    "keep_to_cores",
    "measure_read_bandwidth",
    "num_usable_cores",
    "numa_nodes",
    "parse_bytes",
    "pin_thread",
    "raise_file_limit",
    "run_process",
    "serve",
    "share_of_cores",
    "start_logging",
]
