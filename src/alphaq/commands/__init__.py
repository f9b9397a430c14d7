"""Commands of the command line, a module for each subject; `cli` registers them."""
