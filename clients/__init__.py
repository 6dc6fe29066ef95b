"""Clients of the hub in other languages, and the check that any client can be put through."""
