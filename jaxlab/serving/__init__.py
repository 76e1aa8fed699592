"""Requests of many people on one network: an engine, its policies, and a server."""
