"""The families of published models, one table each."""
