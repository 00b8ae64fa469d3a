"""The command migrator-bench: a file for each of its subcommands."""
