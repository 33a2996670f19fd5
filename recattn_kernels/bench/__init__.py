"""Benchmarks: every op beside what people use today, checked first and timed in the same run."""
