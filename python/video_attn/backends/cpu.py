"""Placeholder until the CPU engineer's file lands."""
