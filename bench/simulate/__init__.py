"""Policies on a model of the guest, the link and the costs, and how well that foretells."""
