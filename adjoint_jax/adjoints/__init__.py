"""Adjoints: how a solve is differentiated."""
