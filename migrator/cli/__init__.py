"""The command migrator: a file for each group of its subcommands."""
