"""A browser, for the tests of pages."""

from pages import browser

__all__ = ["browser"]
