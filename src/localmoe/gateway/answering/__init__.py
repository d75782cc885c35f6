"""The road from a request to its answer, which all APIs share."""
