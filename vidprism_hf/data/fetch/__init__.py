"""Bytes onto this disk: downloads, archives, repositories of the Hub, content hashes."""
