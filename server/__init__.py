"""What starts on the aggregating side."""
