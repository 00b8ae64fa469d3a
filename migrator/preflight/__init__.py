"""May this VM be moved like this: what is looked at, found, and handed on as a plan."""
