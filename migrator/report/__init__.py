"""What happened in a migration: phases, account, report."""
