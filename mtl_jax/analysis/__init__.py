"""What multi-task runs say about their tasks: numbers from the files of runs, in NumPy alone."""
