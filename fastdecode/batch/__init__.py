"""Batch files: a request per line in, a result per line out, and nothing lost in between.

survey    which file is it, is it whole
journal   the output: append, recover, refuse another job's
runner    lines in as there is room, results out as they end
"""
