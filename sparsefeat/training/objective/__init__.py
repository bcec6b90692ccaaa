"""What an SAE is trained for, and the loss of a batch."""
