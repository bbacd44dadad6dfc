"""Sharded parameters, and the communication between processes."""
