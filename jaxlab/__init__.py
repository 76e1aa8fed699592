"""Splits neural networks into parts and exploits the parts: one pure function per published method."""
