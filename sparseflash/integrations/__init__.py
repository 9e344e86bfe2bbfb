"""Integrations with other libraries. Import each by its own name; none is a dependency of the package."""
