"""The programs that are compared: each a module that runs as a process of its own, in an environment of its own."""
