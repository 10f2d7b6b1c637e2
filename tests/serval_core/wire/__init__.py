"""Tests of the wire formats, as a package: its modules may be called like those in other directories."""
