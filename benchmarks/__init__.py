"""Measurements: workloads of the papers, beside what a user would pick instead."""
