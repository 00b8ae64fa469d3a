"""The side that receives: its door, its steps, its states, and its witness."""
