"""What is read from the runs of a study, and its figure: one module a question."""
