"""The subcommands of ``fastdecode``, a file each: ``add_arguments(parser)`` and ``run(args) -> exit code``."""
