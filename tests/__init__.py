"""Tests, one file beside each module of the package."""
