"""Tests of the service controller, as a package: its modules may be called like those in other directories."""
