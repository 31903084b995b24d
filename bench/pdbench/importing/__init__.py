"""The `import` verb: old results of other tools as rows of the tidy table."""
