"""Every text family of Transformers, small and random: equal to eager in seven ways, or refused by name."""
