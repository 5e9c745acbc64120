"""Where jobs run. Truth about them is taken from our own files."""
