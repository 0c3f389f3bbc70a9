"""What clients train: branches, the bank that holds them, their optimizer and their files."""
