"""What several rooms use and none owns: files from strangers, locks, imports by name."""
