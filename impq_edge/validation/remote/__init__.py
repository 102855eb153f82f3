"""The same trial on another machine, over the system's ssh: a file goes there, its report comes back."""
