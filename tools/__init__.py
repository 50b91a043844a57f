"""What keeps the project true: its documentation and its demo."""
