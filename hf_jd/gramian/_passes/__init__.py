"""One vector of losses -> the rows of every parameter: record, prove, complete."""
