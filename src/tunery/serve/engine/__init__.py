"""Answers: one base in memory and many adapters beside it, or another server behind the same front."""
