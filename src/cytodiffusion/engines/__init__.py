"""Engines that run the network: see engine.py."""
