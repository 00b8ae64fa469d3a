"""A migration in its order: rounds, switchover, both destinations, and the guard."""
