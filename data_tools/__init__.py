"""Shards and tables in, shards and reports out: build, validate, summarize."""
