"""`make gpu`: tests, kernel suite, model suite and tuning on a GPU, in the minutes given, without network."""
