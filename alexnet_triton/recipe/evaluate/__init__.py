"""What a trained network is asked for: how good it is, what it sees, its features and filters."""
