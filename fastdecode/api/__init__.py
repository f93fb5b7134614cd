"""What users say and get: parameters, conversations, outputs, a file of options.  Knows nothing of how it is done."""
